"""`mean`: the mean of a group, its target included (the paper's pseudo-code)."""

from __future__ import annotations

from torch import Tensor

from visionzip.merges.base import Groups, merge


@merge("mean")
def combine(tokens: Tensor, groups: Groups) -> Tensor:
    members = groups.members()
    counts = members.sum(dim=1).unsqueeze(-1)  # (B, T, 1), at least the target
    return ((members.transpose(1, 2) @ tokens.float()) / counts).to(tokens.dtype)
