"""What a selector is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visionzip.registry import Registry


@dataclass(frozen=True)
class Features:
    """One layer of a vision encoder, as selection and merging need it. ``B`` images (or tiles, or frames), ``N`` tokens.

    Attributes:
        hidden_states: ``(B, N, D)``, the layer's output: the tokens themselves, CLS first where there is one.
        metric: ``(B, N, d)``, the layer's keys averaged over heads, not normalised: what similarity is measured on.
        scores: ``(B, N)`` float32, importance of each token; ``None`` where the selector does not ask for it.
        has_cls: token 0 is a CLS token, which is always kept.
    """

    hidden_states: Tensor
    metric: Tensor
    scores: Tensor | None
    has_cls: bool

    @property
    def cls(self) -> int:
        """Number of tokens before the first patch: 0 or 1."""
        return int(self.has_cls)


def rows(features: Features, places: list[int]) -> Features:
    """Some images of a batch, in the order of `places`."""
    index = torch.tensor(places, device=features.hidden_states.device)
    scores = None if features.scores is None else features.scores[index]
    return Features(features.hidden_states[index], features.metric[index], scores, features.has_cls)


def joined(parts: list[Features]) -> Features:
    """Several batches as one, in their order; all of one encoder, all with scores or all without."""
    if len(parts) == 1:
        return parts[0]
    hidden_states, metric = (torch.cat([getattr(part, name) for part in parts]) for name in ("hidden_states", "metric"))
    scores = [part.scores for part in parts if part.scores is not None]
    return Features(hidden_states, metric, torch.cat(scores) if scores else None, parts[0].has_cls)


@dataclass(frozen=True)
class Selector:
    """A way to choose patches.

    `rank(features, keep)` returns ``(B, keep)`` int64 patch indices (0 = first patch, CLS not counted), without repetition, and
    the same on every call. Of a `nested` selector they come in an order that does not depend on `keep`: what a smaller budget
    keeps is the beginning of what a larger one does.

    Attributes:
        pools: a control: nothing is chosen, all patches are averaged over the cells whose middles `rank` returns, and CLS is left
            out, as the untouched model does (`visionzip.selectors.pooled`).
        scales: a control: the encoder reads the image scaled down to as many patches as the budget (`pools` then changes nothing).
    """

    name: str
    rank: Callable[[Features, int], Tensor]
    needs_scores: bool
    nested: bool = False
    pools: bool = False
    scales: bool = False

    def select(self, features: Features, keep: int) -> Tensor:
        """`rank`'s patches in raster order: ascending."""
        return self.rank(features, keep).sort(dim=1).values


SELECTORS: Registry[Selector] = Registry("selector", "visionzip.selectors")


def selector(
    name: str, *, needs_scores: bool, nested: bool = False, pools: bool = False, scales: bool = False
) -> Callable[[Callable[[Features, int], Tensor]], Selector]:
    """Register a function `rank(features, keep)` as the selector `name`. `nested` is a promise about its order: see `Selector`."""

    def register(rank: Callable[[Features, int], Tensor]) -> Selector:
        return SELECTORS.register(name)(Selector(name, rank, needs_scores, nested, pools, scales))

    return register
