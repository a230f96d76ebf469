"""Which records of which source, in what order: subsets, weights, shuffling by epoch.

Everything here is a function of seeds and positions alone: no state of a random generator, nothing that depends on how many
processes there are. Two machines agree without talking, and a resumed run knows what it has seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Sampler

from data.index import DiskTable, cached_table
from data.sample import NO_SAMPLE_INDEX

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_positions(count: int, seed: int) -> np.ndarray:
    """One uint64 a position (count,), by SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    with np.errstate(over="ignore"):
        value = (np.arange(count, dtype=np.uint64) + np.uint64(seed % 2**32 * 2**31 + 1)) * _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def select_subset(count: int, fraction: float, maximum: int | None, seed: int) -> np.ndarray:
    """The positions (k,) kept of `count`, ascending: those with the smallest hashes. A smaller subset lies inside a larger one."""
    keep = max(1, round(count * fraction)) if count else 0
    keep = keep if maximum is None else min(keep, maximum)
    if keep >= count:
        return np.arange(count)
    return np.sort(np.argpartition(hash_positions(count, seed), keep)[:keep])


def subset_table(folder: Path, count: int, fraction: float, maximum: int | None, seed: int) -> DiskTable | None:
    """The subset as a table on disk, or None where everything is kept. It depends on the counts alone, so its name does."""
    if fraction >= 1 and (maximum is None or maximum >= count):
        return None
    name = f"subset-{count}-{fraction}-{maximum}-{seed}"
    return cached_table(folder, name, lambda: iter([select_subset(count, fraction, maximum, seed)[:, None]]), 1)


class EpochSampler(Sampler[int]):
    """The indices of one epoch, a permutation drawn from (seed, epoch) and nothing else.

    A source of weight `w` and `n` records gives `round(w·n)` of them an epoch, at least one: whole passes, then a part, which
    goes on in the next epoch where it stopped in this one. With every weight at most 1 no record comes twice in an epoch.
    The end is filled with the no-sample index up to a multiple of `global_batch` (samples a step over all ranks, accumulation
    included), so that no sample is repeated to give every rank an equal share.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, global_batch: int = 1) -> None:
        if global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, found {global_batch}")
        self.sizes, self.weights = list(sizes), list(weights)
        self.seed, self.global_batch = seed, global_batch
        self.epoch = 0
        self.samples = sum(self._share(source) for source in range(len(self.sizes)))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.samples // self.global_batch) * self.global_batch

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        for start in range(0, len(order), 1 << 16):  # as Python numbers only a few at a time
            yield from order[start : start + (1 << 16)].tolist()
        yield from [NO_SAMPLE_INDEX] * (len(self) - len(order))

    def order(self, epoch: int) -> np.ndarray:
        """The indices (samples,) of an epoch, without the filling."""
        starts = np.cumsum([0, *self.sizes])
        drawn = np.concatenate([starts[source] + self._draw(source, epoch) for source in range(len(self.sizes))])
        return np.random.default_rng([self.seed, epoch]).permutation(drawn)

    def _share(self, source: int) -> int:
        return max(min(1, self.sizes[source]), round(self.sizes[source] * self.weights[source]))

    def _draw(self, source: int, epoch: int) -> np.ndarray:
        size, share = self.sizes[source], self._share(source)
        if share == size:
            return np.arange(size)
        fixed = np.random.default_rng([self.seed, source, size]).permutation(size)
        return fixed[np.arange(epoch * share, (epoch + 1) * share) % max(size, 1)]
