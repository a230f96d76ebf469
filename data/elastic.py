"""At which budgets each sample of an epoch is trained, where one projector is trained for several (`ZipConfig.budgets`).

A function of seed, epoch and the sample's place in the epoch's order, as that order is (`data.mixture`): the same for any number of
processes and micro-batches, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from data.mixture import EpochSampler
from data.sample import NO_SAMPLE_INDEX
from visionzip.budgets import ladder, weights
from visionzip.config import ZipConfig

Budget = tuple[int | float, int | float]
"""``(dominant, contextual)``, in tokens or as shares of them."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ divided by the golden ratio
_STREAM = 0xB0D6E7  # keeps these draws apart from those of the order, which have the same seed


@dataclass(frozen=True, slots=True)
class Drawn:
    """An index of a data set, and the budgets at which its sample is trained in this step."""

    index: int
    budgets: tuple[Budget, ...]


class BudgetDraw:
    """Draws budgets by their density.

    Places of an epoch are spread over the density as evenly as can be (multiples of the golden ratio, from a start that seed and
    epoch draw): any stretch of the order, a step for one, has each budget about as often as it should.

    Args:
        config: with `budgets`.
        each: budgets of every sample, evenly spread over the density; equal ones count once.
    """

    def __init__(self, config: ZipConfig, seed: int, each: int = 1) -> None:
        self.budgets: list[Budget] = ladder(config)
        self.upper = np.cumsum(weights(config))
        self.seed, self.each = seed, each

    def __call__(self, epoch: int, start: int, count: int) -> list[tuple[Budget, ...]]:
        """Of the places ``start … start + count`` of an epoch's order."""
        offset = np.random.default_rng([self.seed, epoch, _STREAM]).integers(2**64, dtype=np.uint64)
        apart = np.array([2**64 * number // self.each for number in range(self.each)], dtype=np.uint64)
        with np.errstate(over="ignore"):
            points = np.arange(start, start + count, dtype=np.uint64) * _GOLDEN + offset
            points = points[:, None] + apart
        shares = points.astype(np.float64) / 2.0**64  # (count, each) in [0, 1]
        chosen = np.searchsorted(self.upper, shares * self.upper[-1], side="right").clip(max=len(self.budgets) - 1)
        return [tuple(self.budgets[number] for number in np.unique(row)) for row in chosen]


class DrawnOrder(Sampler):
    """An `EpochSampler` whose indices are `Drawn`; the filling stays what it is."""

    def __init__(self, order: EpochSampler, draw: BudgetDraw) -> None:
        self.order, self.draw = order, draw

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Drawn | int]:
        chunk = 1 << 12
        drawn: list[tuple[Budget, ...]] = []
        for place, index in enumerate(self.order):
            if place % chunk == 0:
                drawn = self.draw(self.order.epoch, place, chunk)
            yield index if index == NO_SAMPLE_INDEX else Drawn(index, drawn[place % chunk])
