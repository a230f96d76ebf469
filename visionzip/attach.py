"""Put compression on one model instance and its processor, and take it off again.

What changes: the inner model's instance gets its own ``get_image_features``, the processor's instance its own
``replace_image_token`` and ``_get_num_multimodal_tokens`` (and ``_process_images``, where images are padded to squares), and the
model's config an entry ``visionzip``. Classes, weights and every other model in the process stay as they are; ``detach`` deletes
exactly what was added.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from visionzip.budgets import as_config, at_budget, ladder
from visionzip.config import ZipConfig
from visionzip.families import Family, VisualTokens, family_for
from visionzip.images import PaddedImages, pads_images
from visionzip.intercept import Interceptions
from visionzip.selectors import SELECTORS
from visionzip.shorten import ShortenPrompts

_ATTRIBUTE = "_visionzip"
_PAUSED = "_visionzip_paused"
_CONFIG_KEY = "visionzip"


@dataclass
class Attachment:
    """What `attach` put on a model; `attached(model)` finds it. The one object the rest of the toolkit talks to."""

    model: PreTrainedModel
    config: ZipConfig
    family: Family
    processor: Any = None
    interceptions: Interceptions = field(default_factory=Interceptions)
    shortener: ShortenPrompts | None = None
    processor_fits: bool = True  # prompts are made by a processor that was attached too
    trained: ZipConfig | None = None  # what the projector in the model was trained with; None: nothing was loaded
    fixed: str = ""  # why the budget can't be changed, where it can't

    @property
    def projector_names(self) -> list[str]:
        """Dotted names of the modules that map visual tokens into the LLM: what VisionZip-FT trains."""
        return list(self.family.projectors)

    def compress(self, budgets: Sequence[Any] | None = None, **image_inputs: Any) -> list[VisualTokens]:
        """Frozen part: image inputs of ``forward`` → for each image its ``(L_i, D)`` tokens. No gradient.

        A pure function of the image, so its result can be stored and used again for every epoch, run and rank.

        Args:
            budgets: one for each entry of the result (`visionzip.budgets.as_config`), where they differ.

        Raises:
            ValueError: for a budget that can't be met, or a family whose images all have the same.
        """
        if budgets is None:
            return self.family.compress(self.config, **image_inputs)
        return self.family.compress_each([self.at(budget) for budget in budgets], **image_inputs)

    def at(self, budget: Any) -> ZipConfig:
        """The config with `budget` for one image; None: the config's own budget.

        Raises:
            ValueError: as `compress`.
        """
        if not self.family.mixed_budgets:
            raise ValueError(
                f"{type(self.model).__name__} needs one budget for all images of a batch; call set_budget before each batch"
            )
        config = as_config(budget, self.config)
        if config is None:
            raise ValueError(
                "an image in a batch can't have all visual tokens; give a number, or set_budget(model, 'all') for the batch"
            )
        if config != self.config:
            self.family.check(config)
        return config

    def encode(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of ``forward`` or ``generate`` whose images have budgets (`visionzip.inputs.prompt_inputs`) → the same with
        ``mm_encoder_outputs`` in place of pixels. Inputs without budgets stay as they are."""
        budgets = {kind: inputs[f"{kind}_budgets"] for kind in self.family.inputs if f"{kind}_budgets" in inputs}
        if not budgets:
            return inputs
        pixels = self.family.image_inputs(inputs)
        tokens = self.compress([each for one in budgets.values() for each in one], **pixels)
        rest = {name: value for name, value in inputs.items() if name not in pixels and not name.endswith("_budgets")}
        outputs: dict[str, Any] = {}
        for kind, one in budgets.items():
            outputs |= self.encoder_outputs(tokens[: len(one)], kind)
            tokens = tokens[len(one) :]
        return {**rest, "mm_encoder_outputs": outputs}

    def change(self, config: ZipConfig) -> None:
        """Change the budget of the model and its processor. What else `config` says must be as it was.

        Raises:
            ValueError: when it can't be met; nothing has changed then.
        """
        self.family.check(config)
        for owner, name, value in self.family.patches(self.processor, config):
            self.interceptions.swap(owner, name, value)
        if self.shortener is not None:
            self.shortener.budget = sum(self.family.budget(config))
        self.config = config
        self.interceptions.swap(self.model.config, _CONFIG_KEY, config.model_dump())

    def project(self, visual_tokens: list[VisualTokens]) -> list[Tensor]:
        """Trained part: `compress`'s result → ``(L_i, hidden)`` embeddings per image, with gradient to the projector."""
        return self.family.project(visual_tokens)

    def encoder_outputs(self, visual_tokens: list[VisualTokens], kind: str = "image") -> dict[str, Any]:
        """`compress`'s result → what ``forward`` and ``generate`` take as ``mm_encoder_outputs`` in place of pixels.

        Args:
            kind: ``"image"`` or ``"video"``; for a batch with both, join the two dicts.
        """
        return {kind: self.family.outputs(visual_tokens, kind)}

    def token_counts(self, **image_inputs: Any) -> list[tuple[int, int]]:
        """For each image (visual tokens of the untouched model, visual tokens now)."""
        return self.family.token_counts(self.config, **image_inputs)

    def holds(self, owner: Any, name: str) -> bool:
        """Whether this attribute of an instance was replaced by this attachment."""
        found = [self.interceptions, *([self.shortener.interceptions] if self.shortener is not None else [])]
        return any(one.holds(owner, name) for one in found)

    def __getstate__(self) -> dict[str, Any]:
        # The processor is the caller's; copying or pickling a model must not copy a tokenizer along.
        found = self.interceptions
        mine = [(owner, name) for owner, name in found.changes if owner is not self.processor]
        return {**self.__dict__, "processor": None, "interceptions": Interceptions(mine, found.handles)}


def attach(model: nn.Module, processor: Any = None, config: ZipConfig | None = None, **budget: Any) -> Any:
    """Compress the visual tokens of `model` from now on.

    Args:
        model: a ``*ForConditionalGeneration`` instance of a supported family (changed in place); wrappers (PEFT, DDP,
            DeepSpeed, ``torch.compile``) are looked through.
        processor: the processor its prompts are made with (changed in place), which then writes ``K`` placeholders an
            image. Without one, prompts made by a stock processor are shortened as they come in.
        config: what to keep; or give its fields: ``attach(model, processor, dominant=54, contextual=10)``.

    Returns:
        `model`, for chaining. Attaching again replaces what was attached.

    Raises:
        ValueError: for a budget that can't be met, a model or vision encoder that is not supported, a processor that does
            not belong to the model. Nothing is changed then.
    """
    if config is not None and budget:
        raise ValueError(f"give either a ZipConfig or its fields, not both (got config and {', '.join(budget)})")
    config = config if config is not None else ZipConfig(**budget)
    if not isinstance(config, ZipConfig):
        raise ValueError(f"config is a {type(config).__name__}; expected a ZipConfig")
    base = unwrap(model)
    family = family_for(base)
    if SELECTORS[config.selector].pools and not family.controls:
        raise ValueError(
            f"{type(base).__name__} does not support selector={config.selector}, which is a control for LLaVA-1.5; choose one of "
            f"{', '.join(name for name, entry in SELECTORS if not entry.pools)}"
        )
    if config.positions == "original" and not family.places:
        raise ValueError(
            f"{type(base).__name__} does not support positions=original; LLaVA-1.5 does (and Qwen's models always keep original "
            "positions). Leave positions out"
        )
    family.check(config)
    for rung in {ladder(config)[0], ladder(config)[-1]} if config.budgets is not None else ():
        try:
            family.check(at_budget(config, rung))
        except ValueError as error:
            raise ValueError(f"budgets: {error}") from None
    if processor is not None:
        family.check_processor(processor)
        _free_processor(processor, base)
    stock = family.stock_count()
    if processor is None and stock is None and family.needs_placeholders:
        raise ValueError(
            f"{type(base).__name__} needs its processor, because the number of placeholders depends on the image; call "
            f"attach(model, processor, ...)"
        )

    patches = family.patches(processor, config)
    if processor is not None and pads_images(processor, config.pad_images):
        patches.append((processor, "_process_images", PaddedImages(processor)))
    shortens = processor is None and stock is not None
    names = [(owner, name) for owner, name, _ in patches] + ([(base, "generate")] if shortens else [])
    check_free(names, attached(base))
    earlier = attached(base) or paused(base)
    detach(base)

    attachment = Attachment(base, config, family, processor, processor_fits=processor is not None)
    attachment.trained = earlier.trained if earlier is not None else None
    put = attachment.interceptions
    for owner, name, value in patches:
        put.replace(owner, name, value)
    for module, hook in family.hooks(config):
        put.before_forward(module, hook)
    if processor is not None:
        written = [name for owner, name, _ in patches if owner is processor]
        put.replace(processor, _ATTRIBUTE, Owner(weakref.ref(base), written))
    if shortens and stock is not None:
        attachment.shortener = ShortenPrompts(base, family.image_token_id, stock, sum(family.budget(config))).install()
    put.replace(base, _ATTRIBUTE, attachment)
    put.replace(base.config, _CONFIG_KEY, config.model_dump())
    return model


def detach(model: nn.Module) -> Any:
    """Take compression off: model and processor give bit-identical outputs to ones never touched. Returns `model`."""
    attachment = attached(model)
    if attachment is not None:
        if attachment.shortener is not None:
            attachment.shortener.remove()
        attachment.interceptions.undo()
    unwrap(model).__dict__.pop(_PAUSED, None)
    return model


def pause(attachment: Attachment) -> None:
    """Take compression off, and remember it for `paused`: the model and its processor use all visual tokens, as after `detach`."""
    base = attachment.model
    detach(base)
    Interceptions().replace(base, _PAUSED, attachment)


def paused(model: nn.Module) -> Attachment | None:
    """What was attached to `model` before `pause`."""
    return unwrap(model).__dict__.get(_PAUSED)


def attached(model: nn.Module) -> Attachment | None:
    """What is attached to `model`, looking through PEFT, DeepSpeed, DDP and ``torch.compile`` wrappers."""
    found = unwrap(model).__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Attachment) else None


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside any wrappers."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None) or model.__dict__.get("_modules", {}).get("module")
        if inner is None and hasattr(model, "get_base_model"):
            inner = cast(Any, model).get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def visionzip(model: PreTrainedModel, dominant: int = 54, contextual: int = 10, processor: Any = None) -> Any:
    """The authors' call: ``model = visionzip(model, dominant=54, contextual=10)``. See `attach`."""
    return attach(model, processor, dominant=dominant, contextual=contextual)


@dataclass
class Owner:
    """On a processor: the model it was attached with, so that a second model does not change the first one's prompts."""

    model: weakref.ref | None
    names: list[str]

    def write(
        self, processor: Any, kind: str, inputs: Any, index: int, budget: Any
    ) -> tuple[str, list[tuple[int | float, int | float]]]:
        """The placeholders of the `index`-th image (or video) at its own budget, and that budget for each entry of `compress`.

        Raises:
            ValueError: as `Attachment.at`; in another process than the model's.
        """
        model = self.model() if self.model is not None else None
        attachment = attached(model) if model is not None else None
        if attachment is None:
            raise ValueError(
                "budgets for single images need the model that the processor was attached with, in this process"
            )
        config, family = attachment.at(budget), attachment.family
        stand_ins = {name: value for _, name, value in family.processor_patches(processor, config)}
        text = stand_ins[f"replace_{kind}_token"](inputs, index)
        token = stand_ins[f"replace_{kind}_token"].token
        entries = text.count(token) // sum(family.budget(config)) if family.by_tile else 1
        return text, [(config.dominant, config.contextual)] * entries

    def __reduce__(self) -> tuple:
        return (Owner, (None, self.names))  # a worker process has the processor alone


def check_free(names: list[tuple[Any, str]], mine: Attachment | None) -> None:
    """Raise ``ValueError`` where one of these ``(object, attribute)`` was replaced on its instance, but not by `mine`."""
    for owner, name in names:
        if name in owner.__dict__ and not (mine is not None and mine.holds(owner, name)):
            raise ValueError(
                f"{type(owner).__name__}.{name} was already replaced on this instance by something else, which attaching would "
                f"override; restore it first (del {type(owner).__name__.lower()}.{name})"
            )


def _free_processor(processor: Any, model: nn.Module) -> None:
    """Refuse a processor that a living model is attached with; clean one whose model is gone."""
    owner = processor.__dict__.get(_ATTRIBUTE)
    if not isinstance(owner, Owner):
        return
    other = owner.model() if owner.model else None
    theirs = attached(other) if other is not None else None
    if other is not None and other is not model and theirs is not None and theirs.processor is processor:
        raise ValueError(
            "this processor is already attached with another model, whose prompts would change too; "
            "load a second processor, or detach the other model first"
        )
    if other is not model:
        for name in (*owner.names, _ATTRIBUTE):
            processor.__dict__.pop(name, None)
