"""`none`: the targets as they are; all others are dropped."""

from __future__ import annotations

from torch import Tensor

from visionzip.merges.base import Groups, merge


@merge("none", uses_rest=False)
def combine(tokens: Tensor, groups: Groups) -> Tensor:
    return tokens[:, groups.targets]
