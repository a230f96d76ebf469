"""An image's visual tokens at several budgets, in one entry of a cache (`ZipConfig.budgets`).

Where the selector is nested (`visionzip.selectors.Selector`) and the family's tokens are what `visionzip.compress` makes, an entry has
one ranked sequence, as long as the largest budget needs; a budget's dominant tokens are its beginning, put back in raster order. Its
contextual tokens, which depend on what is left, are stored for each budget. Otherwise an entry has all tokens of each budget.
With `ZipConfig.positions: original` it also has every token's place among those of the uncompressed image.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.elastic import Budget
from data.sample import Reject
from visionzip import Attachment
from visionzip.budgets import at_budget, ladder
from visionzip.compress import compress_to_budget, cut_ranked, rank_tokens
from visionzip.families import Family
from visionzip.selectors import SELECTORS

MOST = 16
"""Budgets that an entry can have all tokens of. A range without contextual tokens needs one sequence, however many it holds."""

Image = dict[str, Tensor]
"""``ranked (R, D)``, ``places (R,)`` and ``contextual/<number>``, or ``all/<number>`` for each budget. With original positions also
``stock``, the place in the uncompressed image of each ``ranked`` token, and ``stock/<number>``, those of the others."""


class CompressToEach:
    """`Attachment.compress` at all budgets of a config at once: the encoder runs once.

    Raises:
        ValueError: for a selector that is not nested, or more budgets than an entry can have.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.config, self.family = attachment.config, attachment.family
        self.budgets: list[Budget] = ladder(self.config)
        self.sizes = [self.family.budget(at_budget(self.config, budget)) for budget in self.budgets]
        entry = SELECTORS[self.config.selector]
        nested = entry.nested
        self.ranked = nested and self.family.ranked
        self.original = self.config.positions == "original"
        merges = any(contextual for _, contextual in self.sizes)
        if not nested and (
            not merges or entry.pools or entry.scales
        ):  # a control encodes an image anew for each budget
            others = ", ".join(sorted(name for name, other in SELECTORS if other.nested))
            raise ValueError(
                f"the selector {self.config.selector} is not nested: what it keeps at a small budget is not part of what it keeps "
                f"at a larger one, so one cached sequence can't contain all of zip.budgets; choose one of {others}"
            )
        if (merges or not self.ranked) and len(self.budgets) > MOST:
            raise ValueError(
                f"a cache can store the tokens of at most {MOST} budgets separately, found {len(self.budgets)}; list fewer in zip.budgets, or "
                "leave data.cache out"
            )

    def __call__(self, **inputs: Any) -> list[Image]:
        with torch.no_grad():
            return self._ranked(**inputs) if self.ranked else self._each(**inputs)

    def describe(self, token: str) -> dict[str, Any]:
        """What a reader has to know of an entry."""
        return {"token": token, "budgets": [list(budget) for budget in self.budgets], "sizes": self.sizes}

    def _ranked(self, **inputs: Any) -> list[Image]:
        features = self.family.encode(self.config, inputs["pixel_values"])
        tokens, places = rank_tokens(features, self.config, max(dominant for dominant, _ in self.sizes))
        found: list[Image] = [
            {"ranked": each, "places": where.to(torch.int32)} for each, where in zip(tokens, places, strict=True)
        ]
        for number, size in enumerate(self.sizes):
            if size[1]:
                merged = compress_to_budget(features, self.config, size)
                for image, contextual, targets in zip(found, merged.tokens[:, size[0] :], merged.targets, strict=True):
                    image[f"contextual/{number}"] = contextual
                    if self.original:
                        image[f"stock/{number}"] = self._stock_places(targets)
        if self.original:
            for image in found:
                image["stock"] = self._stock_places(image["places"])
        return found

    def _stock_places(self, token: Tensor) -> Tensor:
        family: Any = self.family
        return family.stock_places(token).to(torch.int32)

    def _each(self, **inputs: Any) -> list[Image]:
        family = EncodeOnce.of(self.family)
        found: list[Image] = []
        for number, budget in enumerate(self.budgets):
            family.encode.rewind()
            images = family.compress(at_budget(self.config, budget), **inputs)
            found = found or [{} for _ in images]
            for image, tokens in zip(found, images, strict=True):
                if isinstance(tokens, dict):
                    image[f"stock/{number}"] = tokens["places"].to(torch.int32)
                    tokens = tokens["tokens"]
                image[f"all/{number}"] = tokens
        return found


class EncodeOnce:
    """For a copy of a `Family`: what its encoder gave the first time, again after each `rewind`."""

    def __init__(self, family: Family) -> None:
        self.family, self.next = family, 0
        self.found: list[Any] = []

    @classmethod
    def of(cls, family: Family) -> Any:
        """A copy of `family`, whose `encode` is one of these."""
        other: Any = copy.copy(family)
        other.encode = cls(family)
        return other

    def rewind(self) -> None:
        self.next = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.next == len(self.found):
            self.found.append(self.family.encode(*args, **kwargs))
        self.next += 1
        return self.found[self.next - 1]


def smallest(about: dict[str, Any]) -> Budget:
    dominant, contextual = about["budgets"][0]
    return dominant, contextual


def number_of(about: dict[str, Any], budget: Budget) -> int | None:
    """Of a budget among those of an entry; None: it is not there."""
    return next((number for number, each in enumerate(about["budgets"]) if tuple(each) == tuple(budget)), None)


def tokens_at(image: Image, about: dict[str, Any], budget: Budget) -> Tensor | dict[str, Tensor]:
    """An image's visual tokens at a budget, as `Attachment.compress` gives them: ``(K, D)``, with original positions
    ``{"tokens": (K, D), "places": (K,)}``.

    Raises:
        Reject: the entry does not have them.
    """
    number = number_of(about, budget)
    dominant, contextual = budget if number is None else about["sizes"][number]
    if number is None:
        # Between two budgets of a range without contextual tokens, every number is a beginning of the sequence.
        whole = (
            isinstance(dominant, int)
            and not contextual
            and "ranked" in image
            and not any("/" in name for name in image)
        )
        if not whole or not 0 < dominant <= len(image["ranked"]):
            stored = ", ".join(f"{d} + {c}" for d, c in about["budgets"])
            raise Reject("not in the cache", f"the budget {budget[0]} + {budget[1]}; it has {stored}")
    if "ranked" not in image:
        return _placed(image[f"all/{number}"], image.get(f"stock/{number}"))
    tokens = cut_ranked(image["ranked"], image["places"], int(dominant))
    stock = cut_ranked(image["stock"], image["places"], int(dominant)) if "stock" in image else None
    if contextual:
        tokens = torch.cat([tokens, image[f"contextual/{number}"]])
        stock = torch.cat([stock, image[f"stock/{number}"]]) if stock is not None else None
    return _placed(tokens, stock)


def _placed(tokens: Tensor, stock: Tensor | None) -> Tensor | dict[str, Tensor]:
    return tokens if stock is None else {"tokens": tokens, "places": stock.long()}


def count_tokens(images: Sequence[Tensor | dict[str, Tensor]]) -> int:
    """Visual tokens of all `images` together, in the form that `tokens_at` gives."""
    return sum(len(image["tokens"] if isinstance(image, dict) else image) for image in images)
