"""Samplers of a process: which samples it takes in which micro-batch. All processes compute the same plan; nothing is communicated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from torch.utils.data import Sampler

from data.batching import share
from data.elastic import Drawn, DrawnOrder
from data.mixture import EpochSampler
from data.sample import NO_SAMPLE_INDEX

Order = EpochSampler | DrawnOrder
"""The global order; of a `DrawnOrder` each index comes with its budgets."""


class ShareOfBatches(Sampler[list[int | Drawn]]):
    """Micro-batches of one process, cut from the one global order that all processes agree on.

    A step takes the next ``world × batch × accumulation`` samples of that order, whatever these three are, so a step holds
    the same samples on one process and on eight, and a run can be resumed with another number of them. The order's end is
    filled with the no-sample index up to a whole step: every process gets the same number of batches, and no sample comes twice.
    """

    def __init__(self, order: Order, rank: int, world_size: int, batch: int) -> None:
        if len(order) % (world_size * batch):
            raise ValueError(
                f"an epoch of {len(order)} places is not a multiple of {world_size} processes x {batch} samples"
            )
        self.order, self.rank, self.world_size, self.batch = order, rank, world_size, batch

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order) // (self.world_size * self.batch)

    def __iter__(self) -> Iterator[list[int | Drawn]]:
        together: list[int | Drawn] = []
        for index in self.order:
            together.append(index)
            if len(together) == self.world_size * self.batch:
                yield together[self.rank :: self.world_size]
                together = []


class LengthOf(Protocol):
    def __getitem__(self, index: int | Drawn) -> int: ...


class BalancedBatches(Sampler[list[int | Drawn]]):
    """Micro-batches with about as many tokens each.

    A step is still the next ``world × batch × accumulation`` samples of the global order, in as many micro-batches; these have
    different numbers of samples and about as many tokens each. Filler samples (`NO_SAMPLE_INDEX`) are left out, except from a
    micro-batch that would be empty. `packed`: there will be no padding, so that samples of one micro-batch need not be similarly long.
    """

    def __init__(
        self,
        order: Order,
        rank: int,
        world_size: int,
        batch: int,
        accumulation: int,
        lengths: LengthOf,
        packed: bool = False,
    ) -> None:
        if len(order) % (world_size * batch * accumulation):
            raise ValueError(
                f"an epoch of {len(order)} places is not a multiple of {world_size} processes x {batch} samples x {accumulation} accumulated"
            )
        self.order, self.rank, self.world_size = order, rank, world_size
        self.batch, self.accumulation, self.lengths, self.packed = batch, accumulation, lengths, packed

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order) // (self.world_size * self.batch)

    def __iter__(self) -> Iterator[list[int | Drawn]]:
        places = iter(self.order)
        while step := list(islice(places, self.world_size * self.batch * self.accumulation)):
            real = [index for index in step if index != NO_SAMPLE_INDEX]
            shares = share([self.lengths[index] for index in real], self.world_size, self.accumulation, self.packed)
            for group in shares[self.rank]:
                yield [real[place] for place in group] or [NO_SAMPLE_INDEX]
