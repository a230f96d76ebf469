"""Cutting a step's samples by length: nothing lost, the right number of groups, as cheap as an exhaustive search finds."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from data.batching import balance_tokens, padded, share, split_by_length


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 5))
def test_cut_is_as_cheap_as_an_exhaustive_search(lengths, groups):
    found = split_by_length(lengths, groups)
    assert len(found) == groups
    assert sorted(place for group in found for place in group) == list(range(len(lengths)))
    if len(lengths) < groups:
        return
    order = sorted(lengths)
    best = min(
        max(len(order[a:b]) * order[b - 1] for a, b in itertools.pairwise([0, *places, len(order)]))
        for places in itertools.combinations(range(1, len(order)), groups - 1)
    )
    assert max(padded(lengths, [group]) for group in found) == best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 8))
def test_level_groups_have_about_as_many_tokens(lengths, groups):
    found = balance_tokens(lengths, groups)
    assert len(found) == groups
    assert sorted(place for group in found for place in group) == list(range(len(lengths)))
    totals = [sum(lengths[place] for place in group) for group in found]
    assert max(totals) - min(totals) <= max(lengths)  # Graham: else the last one put there would have gone elsewhere
    assert max(totals) <= 4 / 3 * max(sum(lengths) / groups, max(lengths), two_in_one(lengths, groups))


def two_in_one(lengths, groups) -> int:
    """With more samples than groups some two share one: no cut is better than the best such pair."""
    order = sorted(lengths, reverse=True)
    return order[groups - 1] + order[groups] if len(order) > groups else 0


def test_share_gives_every_rank_as_many_micro_batches_of_like_cost():
    draw = random.Random(0)
    lengths = [100 + int(draw.lognormvariate(4.3, 0.9)) for _ in range(128)]
    shares = share(lengths, world_size=4, accumulation=4)
    assert [len(mine) for mine in shares] == [4] * 4
    assert sorted(place for mine in shares for group in mine for place in group) == list(range(128))
    waiting = sum(
        max(padded(lengths, [mine[step]]) for mine in shares) - min(padded(lengths, [mine[step]]) for mine in shares)
        for step in range(4)
    )
    assert waiting < 0.05 * sum(lengths)
    random_batches = padded(lengths, [list(range(start, start + 8)) for start in range(0, 128, 8)])
    sorted_batches = padded(lengths, [group for mine in shares for group in mine])
    assert sorted_batches < 1.07 * sum(lengths) < 1.3 * sum(lengths) < random_batches
