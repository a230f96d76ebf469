"""What is particular to one family of models, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.compress import Compressed, listened
from visionzip.config import ZipConfig
from visionzip.encoders import Encoder, Layer, encoder_for
from visionzip.families.stand_ins import MediaFeatures, Placeholders, TokenCount, TokenCounts
from visionzip.inputs import merge_image_inputs
from visionzip.registry import Registry
from visionzip.selectors import SELECTORS, Features
from visionzip.words import count_of

#: What `Family.compress` makes of one image: ``(L, D)`` tokens, or several named tensors where a family's projector needs more.
VisualTokens = Tensor | dict[str, Tensor]
#: What attaching puts on an instance: ``(object, attribute, value)``
Patch = tuple[Any, str, Any]
#: What attaching lets see the inputs of a module's ``forward``: ``(module, hook)``; the hook takes ``(module, args, kwargs)``
Hook = tuple[nn.Module, Callable[..., Any]]


class Family(ABC):
    """How one model of a family (a ``model_type`` of transformers) is compressed: ``Llava(model)``.

    Where a model's parts are and what its inputs are called is known of the class, before there is a model. The order of every
    family is the same: `compress` (frozen, a pure function of the image, what a token cache stores), then `project` (what
    trains). Nothing read from the model is stored here: its modules may be replaced at any time (PEFT does), and a copy of the
    object belongs to the copy of the model.

    Args:
        model: the ``*ForConditionalGeneration`` instance, without wrappers.
    """

    #: dotted names, from the model, of the modules that map visual tokens into the LLM: what VisionZip-FT trains
    projectors: ClassVar[tuple[str, ...]] = ("model.multi_modal_projector",)
    tower: ClassVar[str] = "model.vision_tower"
    llm: ClassVar[str] = "model.language_model"
    #: what a projector is trained against and its fingerprint is taken of: part → dotted name. Holds no projector
    frozen: ClassVar[dict[str, str]] = {"encoder": tower, "llm": llm}

    #: kind (``image``, ``video``) → names of the inputs of ``forward``, the pixels first
    inputs: ClassVar[dict[str, tuple[str, ...]]] = {"image": ("pixel_values",)}
    #: kind → the one of them with a row per image or video, where that is not the pixels
    counted: ClassVar[dict[str, str]] = {}
    #: a prompt holds one placeholder per visual token; False: one per image, and the model itself makes room
    needs_placeholders: ClassVar[bool] = True
    #: can be trained for several budgets, one for each image of a batch (`ZipConfig.budgets`)
    per_image_budgets: ClassVar[bool] = False
    #: supports original positions (`ZipConfig.positions`); a family with M-RoPE always has them
    places: ClassVar[bool] = False
    #: supports the controls that select nothing (`Selector.pools`)
    controls: ClassVar[bool] = False
    #: images of one batch can have different budgets: what the model's forward takes has no need of one length
    mixed_budgets: ClassVar[bool] = True
    #: `compress` gives an entry for each tile of an image, not for each image
    by_tile: ClassVar[bool] = False
    #: an image's visual tokens are those of `visionzip.compress` as they are: CLS, dominant patches in raster order, contextual ones
    ranked: ClassVar[bool] = False
    #: an image alone in its prompt and the same one beside others go through the encoder in two ways
    alone_differs: ClassVar[bool] = False
    #: positions are 0, 1, 2 … and attention is causal: leaving out the mask of right padding, or the tokens of a prefix whose keys
    #: and values are cached, changes nothing
    plain_positions: ClassVar[bool] = False
    #: the untouched model can take a new image on the cache of an earlier turn
    images_on_cache: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    # What the model is

    @property
    def encoder_module(self) -> nn.Module:
        """The vision encoder itself, which an adapter of `visionzip.encoders` reads."""
        return self.model.get_submodule(self.tower)

    @property
    def encoder(self) -> Encoder:
        return encoder_for(self.encoder_module)

    @property
    def stock_layer(self) -> Layer:
        """The hidden state of the encoder that the untouched model reads."""
        return self.model.config.vision_feature_layer

    def layer(self, config: ZipConfig) -> Layer:
        """The hidden state of the encoder that is read."""
        return config.layer if config.layer is not None else self.stock_layer

    @property
    def image_token_id(self) -> int:
        """Of the placeholder of a visual token of an image in ``input_ids``. (A processor's may be another: Gemma 3.)"""
        return self.model.config.image_token_id

    @property
    def placeholder_ids(self) -> list[int]:
        """Of images and, where there is one, of videos."""
        ids = (getattr(self.model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        return [token for token in ids if token is not None]

    @classmethod
    def image_inputs(cls, inputs: Any) -> dict[str, Any]:
        """Those of `inputs`, a mapping, that are of images and videos: what `compress` takes."""
        names = [name for kind in cls.inputs.values() for name in kind]
        return {name: inputs[name] for name in names if name in inputs and inputs[name] is not None}

    @classmethod
    def count_images(cls, inputs: Any) -> int:
        """Images and videos in the inputs of ``forward``."""
        total = 0
        for kind, names in cls.inputs.items():
            names = (cls.counted[kind],) if kind in cls.counted else names
            total += next((len(inputs[name]) for name in names if inputs.get(name) is not None), 0)
        return total

    def token_types(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | None:
        """``(B, L)`` token types of a prompt that comes without, where the model reads any: see the hooks of `attach`."""
        return None

    # What fits

    @abstractmethod
    def check(self, config: ZipConfig) -> None:
        """Raise ``ValueError`` for a model or budget that can't work, before anything is changed."""

    def check_processor(self, processor: Any) -> None:
        """Raise ``ValueError`` for a processor whose prompts are not for this model."""
        name = type(self.model).__name__
        if not callable(getattr(processor, "replace_image_token", None)) or not hasattr(processor, "image_token_id"):
            raise ValueError(
                f"{type(processor).__name__} is not a processor for {name}; expected what AutoProcessor.from_pretrained gives "
                f"for the same model"
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

    # The way of an image

    def encode(
        self,
        config: ZipConfig,
        pixel_values: Tensor,
        module: nn.Module | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Features:
        """``(B, C, height, width)`` → features, with scores where the selector (or a listener) needs them.

        Args:
            module: the encoder, for families that have several; default: `encoder_module`.
            grid: rows and columns of patches to scale the images down to.
        """
        scores = SELECTORS[config.selector].needs_scores or listened()
        module = self.encoder_module if module is None else module
        return encoder_for(module).encode(module, pixel_values, self.layer(config), scores=scores, grid=grid)

    @abstractmethod
    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        """Image inputs of the model's ``forward`` → for each image its ``(L_i, D)`` tokens. No gradient."""

    def split(self, **image_inputs: Any) -> list[dict[str, Any]]:
        """The inputs of each entry of `compress`'s result alone, images before videos."""
        found: list[dict[str, Any]] = []
        for names in self.inputs.values():
            given = {name: image_inputs[name] for name in names if image_inputs.get(name) is not None}
            count = len(next(iter(given.values()))) if given else 0
            found += [{name: value[place : place + 1] for name, value in given.items()} for place in range(count)]
        return found

    def compress_each(self, configs: list[ZipConfig], **image_inputs: Any) -> list[VisualTokens]:
        """`compress` with a config for each entry of its result. Images with the same config go through the encoder together.

        Raises:
            ValueError: where there are not as many configs as entries.
        """
        parts = self.split(**image_inputs)
        if len(parts) != len(configs):
            raise ValueError(
                f"{len(configs)} budgets were given for {count_of(len(parts), 'image')}; expected one for each"
            )
        groups: dict[Any, list[int]] = {}
        for place, config in enumerate(configs):
            groups.setdefault((config.model_dump_json(), tuple(parts[place])), []).append(place)
        found: dict[int, VisualTokens] = {}
        for places in groups.values():
            together = self.compress(configs[places[0]], **merge_image_inputs([parts[place] for place in places]))
            found |= dict(zip(places, together, strict=True))
        return [found[place] for place in range(len(parts))]

    def compress_batch(self, config: ZipConfig, pixel_values: Tensor) -> Compressed:
        """``(B, 3, height, width)`` → the same as `compress` in one tensor, for families whose images are all of one size and need
        no more than pixels: what is exported as a graph (`visionzip.export.onnx`)."""
        raise NotImplementedError

    def project(self, visual_tokens: list[VisualTokens]) -> list[Tensor]:
        """``(L_i, D)`` an image → ``(L_i, hidden)`` an image, through the projector, in one call."""
        lengths = [len(tokens) for tokens in visual_tokens]
        projector = self.model.get_submodule(self.projectors[0])
        tokens = torch.cat(cast(list[Tensor], visual_tokens))
        return list(projector(tokens.to(dtype_of(projector, tokens.dtype))).split(lengths))

    def encoder_output(self, embeddings: list[Tensor], kind: str = "image") -> BaseModelOutputWithPooling:
        """`project`'s result in the form the model's ``forward`` takes as ``mm_encoder_outputs[kind]``.

        `kind` is ``"image"`` or ``"video"``. Most families take a list, as their own ``get_image_features`` gives.
        """
        return BaseModelOutputWithPooling(pooler_output=cast(Any, embeddings))

    def outputs(self, visual_tokens: list[VisualTokens], kind: str = "image") -> Any:
        """`compress`'s result → ``mm_encoder_outputs[kind]``: `project`, and whatever else ``forward`` needs to know."""
        return self.encoder_output(self.project(visual_tokens), kind)

    # What attaching puts on the instances

    def patches(self, processor: Any, config: ZipConfig) -> list[Patch]:
        """``(object, attribute, value)``, each a stand-in of `visionzip.families.stand_ins`; detaching takes exactly these off."""
        found: list[Patch] = [
            (self.model.model, f"get_{kind}_features", MediaFeatures(self, config, kind)) for kind in self.inputs
        ]
        return found if processor is None else found + self.processor_patches(processor, config)

    def processor_patches(self, processor: Any, config: ZipConfig) -> list[Patch]:
        counts = self.placeholder_counts(config)
        found: list[Patch] = [
            (processor, f"replace_{kind}_token", Placeholders(getattr(processor, f"{kind}_token"), count))
            for kind, count in counts.items()
        ]
        return [*found, (processor, "_get_num_multimodal_tokens", TokenCounts(**counts))]

    def placeholder_counts(self, config: ZipConfig) -> dict[str, TokenCount]:
        """Kind → how many placeholders a processor writes, for families whose images are placeholders and nothing else."""
        raise NotImplementedError

    def hooks(self, config: ZipConfig) -> list[Hook]:
        """Pre-hooks of ``forward`` that attaching registers, for what no attribute can do (Qwen's positions)."""
        return []

    # Numbers

    def stock_count(self) -> int | None:
        """Placeholders a stock processor writes an image, if that is one number for all images."""
        return None

    @abstractmethod
    def budget(self, config: ZipConfig) -> tuple[int, int]:
        """``(dominant, contextual)`` in tokens, of one image, tile or frame of the encoder's own size."""

    def usual_tokens(self, config: ZipConfig) -> int:
        """Visual tokens to expect of an image, tile or frame before any is there: for estimates of length and memory."""
        return sum(self.budget(config))

    @abstractmethod
    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        """For each image (visual tokens of the untouched model, visual tokens now)."""

    # What the encoder saw, for those who draw it

    def pixels(self, inputs: dict[str, Any]) -> list[Tensor]:
        """``(3, height, width)`` of each image, tile or frame as the encoder takes it, from image inputs; normalised."""
        found = [next((inputs[name] for name in names if name in inputs), None) for names in self.inputs.values()]
        return [tile for pixels in found if pixels is not None for tile in pixels.reshape(-1, *pixels.shape[-3:])]

    def grid(self, patches: int, inputs: dict[str, Any]) -> tuple[int, int]:
        """Rows and columns of an image of so many patches, after pooling or merging where the family selects after it."""
        side = int(patches**0.5)
        rows = next(rows for rows in range(side, 0, -1) if patches % rows == 0)
        return rows, patches // rows


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


def dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)
