"""Budgets as people write them: the one parser and splitter, used by every command.

``"64"`` is a number of tokens, ``"54+10"`` dominant + contextual, ``"0.1"`` or ``"10%"`` a share of the tokens the encoder makes,
``"all"`` no compression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from visionzip.config import ZipConfig, parse_size

ALL = "all"
"""How a budget of all visual tokens (no compression, ``None``) is written; ``"full"`` is understood too."""
CONTEXTUAL_SHARE = 10 / 64
"""Contextual tokens in the paper's budgets: 54 + 10, 108 + 20, 162 + 30 (arXiv 2412.04467, section 4.1)."""
DEFAULT = ZipConfig.model_validate({})
"""The paper's smallest budget, for encoders that make at least `LARGE` tokens."""
SMALL_IMAGE = ZipConfig.model_validate({"dominant": 0.16, "contextual": 0.04})
"""A fifth of the tokens, for encoders that make fewer than `LARGE` of them."""
LARGE = 5 * 64
EXPECTED = "expected a number of tokens (64), dominant+contextual (54+10), a share (0.1 or 10%), or all"


def split_total(total: int | float, own: ZipConfig | None = None) -> tuple[int | float, int | float]:
    """Dominant and contextual tokens of a budget of `total` tokens, or shares of a total share.

    The split that `own` has for this total, else the paper's proportion: 64 → 54 + 10, 32 → 27 + 5, 16 → 13 + 3, 8 → 7 + 1. A
    projector for several budgets (`ZipConfig.budgets`) has the split it names there, whatever the current budget is; without
    contextual tokens every budget is, and a smaller one is the beginning of a larger one.
    """
    if own is not None and own.budgets is not None:
        named = {sum(size): size for size in own.budgets.sizes() if isinstance(size, tuple)}
        if total in named:
            return named[int(total)]
        if not own.budgets.contextual:
            return total, type(total)(0)
        own = None
    same_kind = own is not None and type(own.dominant) is type(own.contextual) is type(total)
    if own is not None and same_kind and math.isclose(own.dominant + own.contextual, total):
        return own.dominant, own.contextual
    if isinstance(total, float):
        return total * (1 - CONTEXTUAL_SHARE), total * CONTEXTUAL_SHARE
    contextual = min(math.floor(total * CONTEXTUAL_SHARE + 0.5), total - 1)
    return total - contextual, contextual


def ladder(config: ZipConfig) -> list[tuple[int | float, int | float]]:
    """``(dominant, contextual)`` of every budget that `config` is trained for, from small to large: tokens, or shares of them.

    One where `ZipConfig.budgets` is None: the fixed budget. `weights` says how often each is drawn.
    """
    if config.budgets is None:
        return [(config.dominant, config.contextual)]
    return [size if isinstance(size, tuple) else split_total(size, config) for size in config.budgets.sizes()]


def weights(config: ZipConfig) -> list[float]:
    """The probability with which training draws each budget of `ladder`; sums to 1."""
    return [1.0] if config.budgets is None else config.budgets.weights()


def at_budget(config: ZipConfig, budget: tuple[int | float, int | float]) -> ZipConfig:
    """`config` with another ``(dominant, contextual)``.

    Raises:
        ValueError: for a budget that no encoder could meet.
    """
    dominant, contextual = budget
    return ZipConfig.model_validate({**config.model_dump(), "dominant": dominant, "contextual": contextual})


def as_config(budget: Any, own: ZipConfig) -> ZipConfig | None:
    """A budget as people write it in Python → `own` with that budget; None for all visual tokens.

    Args:
        budget: a number of tokens (32), a share of them (0.1), ``(27, 5)``, a text that `parse_budget` knows (``"27+5"``,
            ``"all"``), a `ZipConfig` whose budget is meant, or None for `own`'s.

    Raises:
        ValueError: when it is none of these.
    """
    if budget is None:
        return own
    if isinstance(budget, str):
        return parse_budget(budget, own)
    if isinstance(budget, ZipConfig):
        budget = (budget.dominant, budget.contextual)
    if isinstance(budget, tuple) and len(budget) == 2:
        return at_budget(own, budget)
    if (
        not isinstance(budget, int | float)
        or isinstance(budget, bool)
        or budget <= 0
        or (isinstance(budget, float) and budget > 1)
    ):
        raise ValueError(f"{budget!r} is not a budget; {EXPECTED}")
    return at_budget(own, split_total(budget, own))


def is_trained(config: ZipConfig, budget: tuple[int | float, int | float]) -> bool:
    """Whether `budget` is one that `config` is trained for, or lies between two of them.

    Tokens and shares can't be compared without an image: such a budget counts as trained.
    """
    rungs = ladder(config)
    if budget in rungs:
        return True
    totals = [sum(rung) for rung in rungs]
    if type(sum(budget)) is not type(totals[0]):
        return True
    merges = any(contextual for _, contextual in rungs)
    return len(rungs) > 1 and totals[0] <= sum(budget) <= totals[-1] and (merges or not budget[1])


def contextual_for(dominant: int | float, own: ZipConfig) -> int | float:
    """Contextual tokens (or a share) to go with another number of dominant ones than `own` has, in the proportion of `own`."""
    if not own.contextual:
        return own.contextual
    ratio = own.contextual / own.dominant
    if not type(dominant) is type(own.dominant) is type(own.contextual):
        ratio = CONTEXTUAL_SHARE / (1 - CONTEXTUAL_SHARE)
    return dominant * ratio if isinstance(dominant, float) else max(1, math.floor(dominant * ratio + 0.5))


def parse_budget(text: str, own: ZipConfig | None = None) -> ZipConfig | None:
    """`text` → what to attach; None for all visual tokens.

    Args:
        own: the config of the model or projector that the budget is for. Its selector and all else are kept, and its split
            where `text` is its total.

    Raises:
        ValueError: when `text` is not a budget.
    """
    written = text.replace(" ", "").lower()
    if written in (ALL, "full"):
        return None
    size = parse_size(written)
    if size is None:
        raise ValueError(f"{text!r} is not a budget; {EXPECTED}")
    first = size[0] if isinstance(size, tuple) else size
    dominant, contextual = size if isinstance(size, tuple) else split_total(size, own)
    if not first:
        raise ValueError(f"{text!r} is not a budget: it keeps no token; {EXPECTED}")
    if any(isinstance(value, float) and value > 1 for value in (first, dominant, contextual)):
        raise ValueError(f"{text!r} is not a budget: a share is at most 1 (100%); {EXPECTED}")
    return ZipConfig.model_validate({**(own or DEFAULT).model_dump(), "dominant": dominant, "contextual": contextual})


def parse_budgets(text: str, own: ZipConfig | None = None) -> list[ZipConfig | None]:
    """Budgets separated by commas.

    Raises:
        ValueError: when one of them is not a budget.
    """
    return [parse_budget(part, own) for part in text.split(",")]


def parse_tokens(text: str) -> int | float:
    """``"54"`` → 54 tokens, ``"0.1"`` and ``"10%"`` → a share of 0.1.

    Raises:
        ValueError: when `text` is neither.
    """
    size = parse_size(text)
    if size is None or isinstance(size, tuple):
        raise ValueError(f"expected a number of tokens (54) or a share of them (0.1), got {text!r}")
    return size


def format_budget(budget: ZipConfig | None) -> str:
    """``"54 + 10"``, or ``"all"``."""
    return ALL if budget is None else f"{budget.dominant} + {budget.contextual}"


def suitable_budget(image_size: int | Sequence[int] | None, patch_size: int | None) -> ZipConfig:
    """A budget for a model that names none: the paper's 54 + 10, or a fifth of the tokens where an image has few.

    Args:
        image_size, patch_size: pixels, as in the vision config; what is not one number says nothing.
    """
    if isinstance(image_size, int) and isinstance(patch_size, int) and (image_size // patch_size) ** 2 >= LARGE:
        return DEFAULT
    return SMALL_IMAGE
