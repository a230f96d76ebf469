"""Families for models without a head: serving engines build the inner model (``AutoModel``) and bring their own head.

A `Family` looks for its modules below ``model.model``; `Outer` gives an inner model that place. Processors are not changed but
copied, since an engine holds one for all requests, and requests may have budgets of their own.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from visionzip.budgets import as_config, at_budget, format_budget, ladder
from visionzip.config import ZipConfig
from visionzip.families import Family, family_for
from visionzip.images import PaddedImages, pads_images

#: in the config of a model: what to keep of its images, as `visionzip.export.merged` writes it
CONFIG_KEY = "visionzip"


#: model types whose prompts, visual embeddings and answers in vLLM are compared with those of ``generate`` (`tests/serve`)
SERVED = ("llava", "llava_next")


def check_served(model_type: object) -> None:
    """Raise ``ValueError`` for a model that vLLM might serve, but that was never compared with ``generate`` there."""
    if model_type not in SERVED:
        raise ValueError(
            f"models of type {model_type} have not been compared with `generate` in vLLM (those of type {', '.join(SERVED)} have); "
            "serve this one with --engine transformers"
        )


class Outer(nn.Module):
    """An inner model where a family looks for it: ``outer.model``."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.model = inner
        self.config = inner.config
        self.lm_head = nn.Identity()  # tells a whole model from an inner one; never called


def family_of(inner: Any) -> Family:
    """The family of an inner model, such as ``LlavaModel``.

    Raises:
        ValueError: for a model type that is not supported.
    """
    return family_for(Outer(inner))  # type: ignore[arg-type]


def family_of_config(config: Any) -> Family:
    """The same of a model without memory: enough to know how many tokens an image has."""
    from transformers import AutoModel

    with torch.device("meta"):
        return family_of(AutoModel.from_config(config))


def stored_config(config: Any) -> ZipConfig:
    """What a model's config says to keep.

    Raises:
        ValueError: when it says nothing.
    """
    stored = getattr(config, CONFIG_KEY, None)
    if not stored:
        raise ValueError(
            f"the config of this model does not say which visual tokens to keep (no entry {CONFIG_KEY!r}); "
            "write a directory that does: visionzip export … --format merged"
        )
    return ZipConfig.model_validate(dict(stored))


def with_budget(processor: Any, family: Family, config: ZipConfig) -> Any:
    """A copy of `processor` that writes as many placeholders as `config` keeps tokens; tokenizer and image processor are shared.

    Raises:
        ValueError: for a budget that can't be met, or a processor that does not belong to the model.
    """
    family.check(config)
    family.check_processor(processor)
    changed = copy.copy(processor)
    for owner, name, value in family.processor_patches(changed, config):
        owner.__dict__[name] = value
    if pads_images(changed, config.pad_images):
        changed.__dict__["_process_images"] = PaddedImages(changed)
    return changed


#: an engine counts positions itself: the model would answer, and worse than it was trained to
ORIGINAL_POSITIONS = (
    "a model with zip.positions=original can't be served by vLLM, which numbers visual tokens consecutively; serve it with "
    "--engine transformers, or train with positions=compact"
)


class Budgets:
    """The budgets that requests name, and a processor for each.

    Args:
        processor: as ``AutoProcessor`` gives it; stays as it is.
        family: of the model.
        own: what the model keeps where a request names nothing. No request may keep more than the largest of that and of the
            budgets that the projector is trained for: an engine reserves memory for the largest image before it sees any.
    """

    #: budgets that are remembered; requests could name thousands
    REMEMBERED = 32

    def __init__(self, processor: Any, family: Family, own: ZipConfig) -> None:
        if own.positions == "original":
            raise ValueError(ORIGINAL_POSITIONS)
        self.own, self.family = own, family
        # a number of tokens and a share are two keys, also where they are equal (1 and 1.0)
        self._at = lru_cache(self.REMEMBERED, typed=True)(
            lambda dominant, contextual: with_budget(processor, family, at_budget(own, (dominant, contextual)))
        )
        rungs = [at_budget(own, rung) for rung in ladder(own)]
        self.largest = max([own, *rungs], key=self._size)
        self.own_processor, self.largest_processor = (
            self._made(own),
            self._made(self.largest),
        )  # errors now, not at a request

    def config(self, budget: object = None) -> ZipConfig:
        """What a request keeps that names `budget` (``64``, ``"54+10"``, ``0.1``); None: the model's own.

        Raises:
            ValueError: when it is not a budget, or too large.
        """
        config = as_config(budget, self.own)
        if config is None or self._size(config) > self._size(self.largest):
            raise ValueError(
                f"budget={budget} is more than this server keeps, {format_budget(self.largest)} tokens per image; name a smaller one, "
                "or start it with a larger --budget"
            )
        return config

    def _size(self, config: ZipConfig) -> float:
        """Comparable sizes: tokens where every image has the same number, else as written (a share and a number don't compare)."""
        try:
            return sum(self.family.budget(config))
        except ValueError as error:
            kinds = {type(value) for each in (config, self.own) for value in (each.dominant, each.contextual) if value}
            if len(kinds) > 1:
                raise ValueError(
                    f"budget={format_budget(config)} and this server's {format_budget(self.own)} can't be compared: give a "
                    "number of tokens where the server has one, and a share where it has a share"
                ) from error
            return config.dominant + config.contextual

    def processor(self, budget: object = None) -> Any:
        """The processor that writes a request's placeholders.

        Raises:
            ValueError: as `config`.
        """
        return self._made(self.config(budget))

    def _made(self, config: ZipConfig) -> Any:
        return self._at(config.dominant, config.contextual)
