"""`add`: the target and, added to it, the mean of the others (authors' code; the published numbers are of this one)."""

from __future__ import annotations

from torch import Tensor

from visionzip.merges.base import Groups, merge


@merge("add")
def combine(tokens: Tensor, groups: Groups) -> Tensor:
    """A target with no others stays as it is."""
    members = groups.members()
    members[:, groups.targets] = 0.0
    counts = members.sum(dim=1).clamp(min=1.0).unsqueeze(-1)  # (B, T, 1)
    mean = (members.transpose(1, 2) @ tokens.float()) / counts
    return (tokens[:, groups.targets].float() + mean).to(tokens.dtype)
