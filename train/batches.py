"""This process's share of the epoch: which samples it takes in which step."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from data.mixture import EpochSampler


class ShareOfBatches(Sampler[list[int]]):
    """Micro-batches of one process, cut from the one global order that all processes agree on.

    A step takes the next ``world × batch × accumulation`` samples of that order, whatever these three are, so a step holds
    the same samples on one process and on eight, and a run can be resumed with another number of them. The order's end is
    filled with the no-sample index up to a whole step: every process gets the same number of batches, and no sample comes twice.
    """

    def __init__(self, order: EpochSampler, rank: int, world_size: int, batch: int) -> None:
        if len(order) % (world_size * batch):
            raise ValueError(
                f"an epoch of {len(order)} places can't be shared by {world_size} processes x {batch} samples"
            )
        self.order, self.rank, self.world_size, self.batch = order, rank, world_size, batch

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order) // (self.world_size * self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        together: list[int] = []
        for index in self.order:
            together.append(index)
            if len(together) == self.world_size * self.batch:
                yield together[self.rank :: self.world_size]
                together = []
