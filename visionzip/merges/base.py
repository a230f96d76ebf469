"""What a merge is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from visionzip.registry import Registry

CHUNK = 1024
"""Tokens whose weights are asked for at once: bounds memory to B × R × CHUNK floats."""


@dataclass(frozen=True)
class Groups:
    """``R`` tokens of each of ``B`` images that are not kept as they are, in ``T`` groups, each around a target.

    Attributes:
        targets: ``(T,)`` int64, places of the targets among the ``R``.
        group: ``(B, R)`` int64 in ``[0, T)``, the group of every token; a target's is its own.
        metric: ``(B, R, d)``, the tokens' keys, not normalised.
    """

    targets: Tensor
    group: Tensor
    metric: Tensor

    def members(self) -> Tensor:
        """``(B, R, T)`` float32: 1 where a token belongs to a group. Sums are products with it, not a scatter-add, whose order on
        a GPU is random."""
        return functional.one_hot(self.group, len(self.targets)).to(torch.float32)


@dataclass(frozen=True)
class Merge:
    """A way to make one token of a group.

    `combine(tokens, groups)` takes tokens ``(B, R, D)`` and returns ``(B, T, D)`` of the same dtype. It is linear in `tokens`,
    and a token counts in its own group alone: families that merge behind their projector ask it for each token's weight.
    """

    name: str
    combine: Callable[[Tensor, Groups], Tensor]
    uses_rest: bool  # False: nothing but the targets counts, and the others are dropped

    def weights(self, groups: Groups) -> Tensor:
        """``(B, R)`` float32: how much of each token is in its group's."""
        batch, rest = groups.group.shape
        each = torch.eye(rest, device=groups.group.device)
        found = []
        for start in range(0, rest, CHUNK):
            columns = slice(start, start + CHUNK)
            mixed = self.combine(each[:, columns].expand(batch, -1, -1), groups)  # (B, T, C)
            found.append(mixed.gather(1, groups.group[:, columns].unsqueeze(1)).squeeze(1))
        return torch.cat(found, dim=1)


MERGES: Registry[Merge] = Registry("merge", "visionzip.merges")


def merge(name: str, *, uses_rest: bool = True) -> Callable[[Callable[[Tensor, Groups], Tensor]], Merge]:
    """Register a function `combine(tokens, groups)` as the merge `name`."""

    def register(combine: Callable[[Tensor, Groups], Tensor]) -> Merge:
        return MERGES.register(name)(Merge(name, combine, uses_rest))

    return register
