"""What is particular to one family of models, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.adaptive import dominant_of_each
from visionzip.compress import Compressed, compress, listened, part
from visionzip.config import ZipConfig
from visionzip.encoders import Encoder, Layer, encoder_for
from visionzip.registry import Registry
from visionzip.selectors import SELECTORS, Features, rows

#: What `Family.compress` makes of one image: ``(L, D)`` tokens, or several named tensors where a family's projector needs more.
VisualTokens = Tensor | dict[str, Tensor]


class Family(ABC):
    """How one model of a family (a ``model_type`` of transformers) is compressed: ``Llava(model)``.

    Where a model's parts are is known of the class, before there is a model. The order of every family is the same: `compress`
    (frozen, a pure function of the image, what a token cache stores), then `project` (what trains). Subclasses say where things
    are and how compressed tokens become a sequence. Nothing read from the model is stored here: its modules may be replaced at
    any time (PEFT does), and a copy of the object belongs to the copy of the model.

    Args:
        model: the ``*ForConditionalGeneration`` instance, without wrappers.
    """

    #: dotted names, from the model, of the modules that map visual tokens into the LLM: what VisionZip-FT trains
    projectors: ClassVar[tuple[str, ...]] = ("model.multi_modal_projector",)
    tower: ClassVar[str] = "model.vision_tower"
    llm: ClassVar[str] = "model.language_model"
    #: what a projector is trained against and its fingerprint is taken of: part → dotted name. Holds no projector
    frozen: ClassVar[dict[str, str]] = {"encoder": tower, "llm": llm}
    #: a prompt holds one placeholder a visual token; False: one a picture, and the model itself makes room
    needs_placeholders: ClassVar[bool] = True
    #: supports per-image budgets (`ZipConfig.adaptive`)
    per_image_budgets: ClassVar[bool] = False
    #: a picture alone in its prompt and the same one beside others go through the encoder in two ways
    alone_differs: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @property
    def encoder(self) -> Encoder:
        return encoder_for(self.model.get_submodule(self.tower))

    @abstractmethod
    def check(self, config: ZipConfig) -> None:
        """Raise ``ValueError`` for a model or budget that can't work, before anything is changed."""

    def check_processor(self, processor: Any) -> None:
        """Raise ``ValueError`` for a processor whose prompts are not for this model."""
        if not callable(getattr(processor, "replace_image_token", None)) or not hasattr(processor, "image_token_id"):
            raise ValueError(
                f"{type(processor).__name__} is not a processor for {type(self.model).__name__}; expected what "
                f"AutoProcessor.from_pretrained gives for the same model"
            )
        facts = self.processor_facts(processor)
        wrong = [
            f"{key} {found} (the model: {expected})"
            for key, (found, expected) in facts.items()
            if found is not None and found != expected  # processors of older checkpoints do not say everything
        ]
        if wrong:
            raise ValueError(
                f"this processor does not belong to the model: {', '.join(wrong)}. Load both from the same place."
            )

    @abstractmethod
    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        """What has to agree: name → (the processor's value, the model's)."""

    @abstractmethod
    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        """Image inputs of the model's ``forward`` → for each picture its ``(L_i, D)`` tokens. No gradient."""

    def project(self, visual_tokens: list[VisualTokens]) -> list[Tensor]:
        """``(L_i, D)`` a picture → ``(L_i, hidden)`` a picture, through the projector, in one call."""
        lengths = [len(tokens) for tokens in visual_tokens]
        projector = self.model.get_submodule(self.projectors[0])
        tokens = torch.cat(cast(list[Tensor], visual_tokens))
        return list(projector(tokens.to(dtype_of(projector, tokens.dtype))).split(lengths))

    def encoder_output(self, embeddings: list[Tensor], kind: str = "image") -> BaseModelOutputWithPooling:
        """`project`'s result in the form the model's ``forward`` takes as ``mm_encoder_outputs[kind]``.

        `kind` is ``"image"`` or ``"video"``. Most families take a list, as their own ``get_image_features`` gives.
        """
        return BaseModelOutputWithPooling(pooler_output=cast(Any, embeddings))

    def outputs(self, visual_tokens: list[VisualTokens], kind: str = "image") -> BaseModelOutputWithPooling:
        """`compress`'s result → ``mm_encoder_outputs[kind]``: `project`, and whatever else ``forward`` needs to know."""
        return self.encoder_output(self.project(visual_tokens), kind)

    @abstractmethod
    def patches(self, processor: Any, config: ZipConfig) -> list[tuple[object, str, object]]:
        """What attaching puts on the instances: ``(object, attribute, value)``; detaching takes exactly these off."""

    def hooks(self, config: ZipConfig) -> list[RemovableHandle]:
        """Hooks that attaching registers, for what no attribute can do (Qwen's positions). Removed by detaching."""
        return []

    def stock_count(self) -> int | None:
        """Placeholders a stock processor writes a picture, if that is one number for all pictures."""
        return None

    @abstractmethod
    def budget(self, config: ZipConfig) -> tuple[int, int]:
        """``(dominant, contextual)`` in tokens, of one picture, tile or frame of the encoder's own size."""

    @abstractmethod
    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        """For each picture (visual tokens of the untouched model, visual tokens now)."""


FAMILIES: Registry[type[Family]] = Registry("model family", "visionzip.families")


def family_for(model: PreTrainedModel) -> Family:
    """The family of a transformers model, by its config's ``model_type``, made for this model.

    Raises:
        ValueError: for anything else; says what was found and what is supported.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is None:
        found = f"{type(model).__name__} (model_type {model_type!r})" if model_type else type(model).__name__
        raise ValueError(
            f"{found} is not a model that can be compressed; supported model types: {', '.join(FAMILIES.names())}. "
            f"Pass the *ForConditionalGeneration model that from_pretrained returns."
        )
    if not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} has no language-model head; pass the *ForConditionalGeneration model, not its inner part"
        )
    return family(model)


def read(encoder: Encoder, tower: nn.Module, pixel_values: Tensor, layer: Layer, config: ZipConfig) -> Features:
    """Encode ``(B, C, height, width)``, with scores where the selector (or somebody who looks on) needs them."""
    adaptive = config.adaptive is not None and config.adaptive.needs_scores
    needs_scores = SELECTORS[config.selector].needs_scores or adaptive or listened()
    return encoder.encode(tower, pixel_values, layer, scores=needs_scores)


def shrink(features: Features, config: ZipConfig, budget: tuple[int, int] | None = None) -> Compressed:
    """Compress features with `config`'s selector and merge; with its budget too, unless another is given."""
    if budget is None:
        budget = config.resolve(features.hidden_states.shape[1], reserved=features.cls)
    return compress(features, *budget, selector=config.selector, merge=config.merge)


def shrink_each(features: Features, config: ZipConfig) -> list[Compressed]:
    """Compress each of ``B`` pictures to a budget of its own (`ZipConfig.adaptive`): batches of one.

    Pictures that keep equally many are compressed together. Somebody who listens gets them one by one, in their order.
    """
    assert config.adaptive is not None
    most, contextual = config.resolve(features.hidden_states.shape[1], reserved=features.cls)
    wanted = dominant_of_each(features, config.adaptive, most)
    groups: dict[Any, list[int]] = {}
    for place, count in enumerate(wanted):
        groups.setdefault((count, place) if listened() else count, []).append(place)
    found: dict[int, Compressed] = {}
    for places in groups.values():
        together = shrink(rows(features, places), config, (wanted[places[0]], contextual))
        found |= {place: part(together, number, number + 1) for number, place in enumerate(places)}
    return [found[place] for place in range(len(wanted))]


def select(encoder: Encoder, tower: nn.Module, pixel_values: Tensor, layer: Layer, config: ZipConfig) -> Compressed:
    """Encode ``(B, C, height, width)`` and compress each of the ``B`` on its own."""
    return shrink(read(encoder, tower, pixel_values, layer, config), config)


@dataclass
class ImageFeatures:
    """Stands in for ``get_image_features`` in the instance of one inner model.

    A picklable object rather than a bound method, which pickle would lose in silence; the explicit signature is what
    ``generate`` inspects.
    """

    family: Family  # deepcopy follows the reference to its model, so a copied model calls its own copy
    config: ZipConfig

    def __call__(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        batch_num_images: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Pictures → ``pooler_output``, a list of ``(L_i, hidden)``. The strategy is moot: CLS is kept and counted.

        Raises:
            ValueError: when another layer is asked for than the one the ZipConfig reads.
        """
        inputs = {"pixel_values": pixel_values, "image_sizes": image_sizes, "batch_num_images": batch_num_images}
        return self.features("image", vision_feature_layer, inputs)

    def features(
        self, kind: str, vision_feature_layer: int | list[int] | None, inputs: dict[str, Any]
    ) -> BaseModelOutputWithPooling:
        stock = self.family.model.config.vision_feature_layer
        reads = self.config.layer if self.config.layer is not None else stock
        if vision_feature_layer is not None and vision_feature_layer not in (reads, stock):
            raise ValueError(
                f"vision_feature_layer={vision_feature_layer} was asked for, but this model is attached to layer {reads}; "
                f"attach it with ZipConfig(layer={vision_feature_layer})"
            )
        given = {name: value for name, value in inputs.items() if value is not None}
        return self.family.outputs(self.family.compress(self.config, **given), kind)


@dataclass
class VideoFeatures(ImageFeatures):
    """Stands in for ``get_video_features``: each video is a picture of its own, made of its frames."""

    def __call__(  # type: ignore[override]
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """``(videos, frames, C, height, width)`` → ``pooler_output``, one entry a video."""
        return self.features("video", vision_feature_layer, {"pixel_values_videos": pixel_values_videos})


def dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)
