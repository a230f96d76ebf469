"""Mini-Gemini (MGM): CLIP for tokens, a ConvNeXt at twice the resolution for detail, and mining between the two.

transformers has no class for it. This is written against the structure of the authors' code (github.com/dvlab-research/MGM), whose
package does not import beside transformers 5; it works for a model object that has the same members (a port of that class), and is
tested with a small one of that structure, never with published weights. docs/mini-gemini.md says more.

**Selection stands after the mining** and before ``mm_projector``. Each of CLIP's tokens looks at its own square of the ConvNeXt's
feature map and adds what it finds; as no token looks elsewhere, choosing dominant tokens before or after makes no difference to
them, but contextual tokens are means, and their members' details should be in. Mining stays frozen, ``mm_projector`` alone
trains (the paper's recipe), and a cached picture is ``(K, D)`` as for LLaVA. CLS scores but is not kept: it has no square to mine,
and the untouched model drops it. So `dominant` counts patches only.

Prompts need no change: the model's own code puts each picture where its one marker (-200) stands, however long it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from visionzip.config import ZipConfig
from visionzip.encoders import Encoder, encoder_for
from visionzip.families.base import FAMILIES, Family, Picture, read, shrink

MEMBERS = ("get_vision_tower", "get_vision_tower_aux", "unified_resampler", "encode_images")


class MiniGemini(Family):
    """``images`` ``(B, 3, h, w)`` and ``images_aux`` ``(B, 3, H, W)`` → ``(K, D)`` a picture."""

    projector: ClassVar[str] = "model.mm_projector"
    llm: ClassVar[str] = "model.layers"
    needs_placeholders: ClassVar[bool] = False

    def clip(self, model: PreTrainedModel) -> Any:
        """The `CLIPVisionModel` inside the authors' wrapper."""
        return cast(Any, model).get_vision_tower().vision_tower

    def encoder(self, model: PreTrainedModel) -> Encoder:
        return encoder_for(self.clip(model))

    def layer(self, model: PreTrainedModel, config: ZipConfig) -> int:
        return config.layer if config.layer is not None else cast(Any, model).get_vision_tower().select_layer

    def budget(self, model: PreTrainedModel, config: ZipConfig) -> tuple[int, int]:
        return config.resolve(self.encoder(model).tokens(self.clip(model)) - 1)

    def check(self, model: PreTrainedModel, config: ZipConfig) -> None:
        missing = [name for name in MEMBERS if not callable(getattr(model, name, None))]
        if missing:
            raise ValueError(
                f"{type(model).__name__} says it is {model.config.model_type!r} but has no {', '.join(missing)}; expected the "
                f"members of the authors' MGMMetaForCausalLM"
            )
        if getattr(model.config, "image_grid", 1) > 1:
            raise ValueError(
                f"image_grid={model.config.image_grid}: the HD models, which cut pictures into tiles, are not supported"
            )
        self.encoder(model).layers_run(self.clip(model), self.layer(model, config))
        self.budget(model, config)

    def processor_facts(self, model: PreTrainedModel, processor: Any) -> dict[str, tuple[Any, Any]]:
        raise ValueError(f"{type(model).__name__}'s prompts need no change; attach it without a processor")

    @torch.no_grad()
    def compress(self, model: PreTrainedModel, config: ZipConfig, **image_inputs: Any) -> list[Picture]:
        outer, images, detailed = cast(Any, model), image_inputs["images"], image_inputs.get("images_aux")
        clip = self.clip(model)
        found = read(self.encoder(model), clip, images.to(clip.device, clip.dtype), self.layer(model, config), config)
        patches = found.hidden_states[:, 1:]
        if detailed is not None:
            squares = outer.get_vision_tower_aux()(detailed).to(patches.device, patches.dtype)
            patches, mined = outer.unified_resampler(patches, squares)
            patches = patches + mined
        scores = None if found.scores is None else found.scores[:, 1:]
        features = replace(found, hidden_states=patches, metric=found.metric[:, 1:], scores=scores, has_cls=False)
        return list(shrink(features, config).tokens)

    def patches(self, model: PreTrainedModel, processor: Any, config: ZipConfig) -> list[tuple[object, str, object]]:
        return [(model, "encode_images", EncodeImages(model, self, config))]

    def token_counts(self, model: PreTrainedModel, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        stock = self.encoder(model).tokens(self.clip(model)) - 1
        return [(stock, sum(self.budget(model, config)))] * len(image_inputs["images"])


FAMILIES.register("mgm", "mgm_mistral", "mgm_mixtral", "mgm_gemma", "mini_gemini")(MiniGemini())


@dataclass
class EncodeImages:
    """Stands in for ``encode_images`` in the instance of one model."""

    model: PreTrainedModel
    family: Family
    config: ZipConfig

    def __call__(self, images: Tensor, images_aux: Tensor | None = None, is_video: bool = False) -> Tensor:
        """Pictures → ``(B, K, hidden)``."""
        pictures = self.family.compress(self.model, self.config, images=images, images_aux=images_aux)
        return torch.stack(self.family.project(self.model, pictures))
