"""Micro-batches of similar lengths: the samples of a step stay the same, only their grouping changes.

The loss is a mean over the supervised tokens of the whole step, so how its samples are cut into micro-batches changes nothing but
the padding. Sorted by length and cut by a budget of padded tokens, a batch has next to none of it; no attention mask is needed
then (padding stands behind what is real, where a causal model does not look), so the causal flash kernel is used.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def split_by_length(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Places in `lengths` in exactly `groups` groups, such that the costliest one is as cheap as can be.

    A group costs its rows times its longest row. Groups are runs of the sorted order, ascending; with fewer samples than groups
    the first ones are empty. O(n log n + n log total).
    """
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    if len(order) <= groups:
        return [[]] * (groups - len(order)) + [[place] for place in order]
    low, high = max(lengths), len(order) * max(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(order, lengths, middle)) <= groups else (middle + 1, high)
    runs = _runs(order, lengths, low)
    while len(runs) < groups:  # fewer than asked for: split the costliest that can be split
        widest = max((run for run in runs if len(run) > 1), key=lambda run: len(run) * lengths[run[-1]])
        at = runs.index(widest)
        runs[at : at + 1] = [widest[: len(widest) // 2], widest[len(widest) // 2 :]]
    return runs


def _runs(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Greedy from the long end, where a row more costs most: the fewest runs that keep to the budget."""
    runs: list[list[int]] = []
    longest = 0
    for place in reversed(order):
        if runs and (len(runs[-1]) + 1) * longest <= budget:
            runs[-1].append(place)
        else:
            runs.append([place])
            longest = lengths[place]
    return [run[::-1] for run in reversed(runs)]


def padded(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> int:
    """Tokens that go through the model, padding included."""
    return sum(len(group) * max(lengths[place] for place in group) for group in groups if group)


def balance_tokens(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Places in exactly `groups` groups of about as many tokens, for rows without padding: the longest first, each to the group
    that has least (Graham 1969). Within a group in the order given."""
    filled: list[list[int]] = [[] for _ in range(groups)]
    heap = [(0, number) for number in range(groups)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        total, number = heapq.heappop(heap)
        filled[number].append(place)
        heapq.heappush(heap, (total + max(1, lengths[place]), number))
    return [sorted(group) for group in filled]


def share(lengths: Sequence[int], world_size: int, accumulation: int, packed: bool = False) -> list[list[list[int]]]:
    """``[rank][micro-batch]`` → places. Ranks that work at the same time get groups of similar cost.

    The groups cost about the same by construction. To even out the rest, in each micro-step the ranks take neighbours of the sorted
    costs, and which rank gets the larger one alternates.
    """
    if packed:
        groups = sorted(
            balance_tokens(lengths, world_size * accumulation), key=lambda group: sum(lengths[place] for place in group)
        )
    else:
        groups = sorted(split_by_length(lengths, world_size * accumulation), key=lambda group: padded(lengths, [group]))
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    for step in range(accumulation):
        together = groups[step * world_size : (step + 1) * world_size]
        for rank, group in enumerate(together if step % 2 == 0 else reversed(together)):
            shares[rank].append(group)
    return shares
