"""Mini-Gemini (MGM): CLIP for tokens, a ConvNeXt at twice the resolution for detail, and mining between the two.

transformers has no class for it. This is written against the structure of the authors' code (github.com/dvlab-research/MGM), whose
package does not import beside transformers 5; it works for a model object that has the same members (a port of that class), and is
tested with a small one of that structure, never with published weights. docs/mini-gemini.md says more.

**Selection stands after the mining** and before ``mm_projector``. Each of CLIP's tokens looks at its own square of the ConvNeXt's
feature map and adds what it finds; as no token looks elsewhere, choosing dominant tokens before or after makes no difference to
them, but contextual tokens are means, and their members' details should be in. Mining stays frozen, ``mm_projector`` alone
trains (the paper's recipe), and a cached image is ``(K, D)`` as for LLaVA. CLS scores but is not kept: it has no square to mine,
and the untouched model drops it. So `dominant` counts patches only.

Prompts need no change: the model's own code puts each image where its one marker (-200) stands, however long it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from visionzip.compress import compress_to_budget
from visionzip.config import ZipConfig
from visionzip.encoders import Layer
from visionzip.families.base import FAMILIES, Family, Patch, VisualTokens
from visionzip.families.stand_ins import MediaFeatures

MEMBERS = ("get_vision_tower", "get_vision_tower_aux", "unified_resampler", "encode_images")


class MiniGemini(Family):
    """``images`` ``(B, 3, h, w)`` and ``images_aux`` ``(B, 3, H, W)`` → ``(K, D)`` per image."""

    projectors: ClassVar[tuple[str, ...]] = ("model.mm_projector",)
    llm: ClassVar[str] = "model.layers"
    frozen: ClassVar[dict[str, str]] = {"encoder": Family.tower, "llm": llm}
    inputs: ClassVar[dict[str, tuple[str, ...]]] = {"image": ("images", "images_aux", "is_video")}
    mixed_budgets: ClassVar[bool] = False
    needs_placeholders: ClassVar[bool] = False

    @property
    def encoder_module(self) -> Any:
        """The `CLIPVisionModel` inside the authors' wrapper."""
        return self.model.get_vision_tower().vision_tower

    @property
    def stock_layer(self) -> Layer:
        return self.model.get_vision_tower().select_layer

    def budget(self, config: ZipConfig) -> tuple[int, int]:
        return config.resolve(self.encoder.tokens(self.encoder_module) - 1)

    def check(self, config: ZipConfig) -> None:
        missing = [name for name in MEMBERS if not callable(getattr(self.model, name, None))]
        if missing:
            raise ValueError(
                f"{type(self.model).__name__} says it is {self.model.config.model_type!r} but has no {', '.join(missing)}; expected the "
                f"members of the authors' MGMMetaForCausalLM"
            )
        if getattr(self.model.config, "image_grid", 1) > 1:
            raise ValueError(
                f"image_grid={self.model.config.image_grid}: the HD models, which cut images into tiles, are not supported"
            )
        self.encoder.layers_run(self.encoder_module, self.layer(config))
        self.budget(config)

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        raise ValueError(f"{type(self.model).__name__}'s prompts need no change; attach it without a processor")

    @torch.no_grad()
    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        outer, images, detailed = self.model, image_inputs["images"], image_inputs.get("images_aux")
        clip = self.encoder_module
        found = self.encode(config, images.to(clip.device, clip.dtype))
        patches = found.hidden_states[:, 1:]
        if detailed is not None:
            squares = outer.get_vision_tower_aux()(detailed).to(patches.device, patches.dtype)
            patches, mined = outer.unified_resampler(patches, squares)
            patches = patches + mined
        scores = None if found.scores is None else found.scores[:, 1:]
        features = replace(found, hidden_states=patches, metric=found.metric[:, 1:], scores=scores, has_cls=False)
        return list(compress_to_budget(features, config).tokens)

    def outputs(self, visual_tokens: list[VisualTokens], kind: str = "image") -> Tensor:
        """``(B, K, hidden)``, as the model's own ``encode_images`` gives."""
        return torch.stack(self.project(visual_tokens))

    def patches(self, processor: Any, config: ZipConfig) -> list[Patch]:
        return [(self.model, "encode_images", MediaFeatures(self, config))]

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        stock = self.encoder.tokens(self.encoder_module) - 1
        return [(stock, sum(self.budget(config)))] * len(image_inputs["images"])


FAMILIES.register("mgm", "mgm_mistral", "mgm_mixtral", "mgm_gemma", "mini_gemini")(MiniGemini)
