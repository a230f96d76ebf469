"""Micro-batches of like lengths: each step the same samples as without, over ranks and accumulation, and hardly any padding."""

from __future__ import annotations

import random

import pytest

from data.mixture import EpochSampler
from train.batches import BalancedBatches, ShareOfBatches

SAMPLES, BATCH = 203, 4
LENGTHS = [60 + int(random.Random(number).lognormvariate(4, 1)) for number in range(SAMPLES)]


def order(world: int, accumulation: int) -> EpochSampler:
    return EpochSampler([SAMPLES], [1.0], seed=3, global_batch=world * BATCH * accumulation)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 8), (2, 4), (4, 1)])
def test_the_same_samples_in_every_step(world, accumulation):
    plain = [list(ShareOfBatches(order(world, accumulation), rank, world, BATCH)) for rank in range(world)]
    sorted_ = [
        list(BalancedBatches(order(world, accumulation), rank, world, BATCH, accumulation, LENGTHS))
        for rank in range(world)
    ]
    assert {len(batches) for batches in plain} == {len(batches) for batches in sorted_} == {len(plain[0])}
    for start in range(0, len(plain[0]), accumulation):

        def taken(ranks, start=start):
            rows = (batch for batches in ranks for batch in batches[start : start + accumulation])
            return sorted(index for batch in rows for index in batch if index >= 0)

        assert taken(plain) == taken(sorted_)
    seen = sorted(index for batches in sorted_ for batch in batches for index in batch if index >= 0)
    assert seen == list(range(SAMPLES))


def test_hardly_any_padding():
    def padding(batches):
        real = sum(LENGTHS[index] for batch in batches for index in batch if index >= 0)
        return sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches if max(batch) >= 0) / real

    assert padding(BalancedBatches(order(1, 32), 0, 1, BATCH, 32, LENGTHS)) < 1.06
    assert padding(ShareOfBatches(order(1, 32), 0, 1, BATCH)) > 1.25


def test_epochs_differ_and_odd_shares_are_refused():
    batches = BalancedBatches(order(1, 8), 0, 1, BATCH, 8, LENGTHS)
    first = list(batches)
    batches.set_epoch(1)
    assert list(batches) != first
    with pytest.raises(ValueError, match="not a multiple"):
        BalancedBatches(order(1, 1), 0, 1, BATCH, 7, LENGTHS)
