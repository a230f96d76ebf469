"""`vispruner`: half by attention, half by removing duplicates step by step (VisPruner, ICCV 2025, arXiv 2412.01818)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.selectors.base import Features, selector

IMPORTANT = 0.5  # share of the budget that attention decides; the paper's default
STEP = 8  # duplicates removed at once, at most


@selector("vispruner", needs_scores=True)
def rank(features: Features, keep: int) -> Tensor:
    """The highest scores first; of the rest, duplicates go until the budget is met.

    A step parts what is left into every other token (a) and those between (b), and removes from a the tokens that are most
    like some token of b, at most `STEP` at a time and never more than still have to go. O(N²·D / STEP) in all.
    """
    assert features.scores is not None  # needs_scores
    scores = features.scores[:, features.cls :]
    tokens = F.normalize(features.hidden_states[:, features.cls :].float(), dim=-1)
    important = round(keep * IMPORTANT)
    order = scores.argsort(dim=1, descending=True, stable=True)
    first, left = order[:, :important], order[:, important:].sort(dim=1).values  # what is left is in raster order
    while left.shape[1] > keep - important:
        gone = min(STEP, left.shape[1] - (keep - important), (left.shape[1] + 1) // 2)
        if left.shape[1] == 1:
            left = left[:, :0]
            break
        a, b = left[:, ::2], left[:, 1::2]
        width = tokens.shape[-1]
        tokens_a = tokens.gather(1, a.unsqueeze(-1).expand(-1, -1, width))
        tokens_b = tokens.gather(1, b.unsqueeze(-1).expand(-1, -1, width))
        likeness = (tokens_a @ tokens_b.transpose(1, 2)).amax(dim=2)  # (B, |a|)
        unlike = likeness.argsort(dim=1, stable=True)[:, : a.shape[1] - gone]
        left = torch.cat((a.gather(1, unlike), b), dim=1).sort(dim=1).values
    return torch.cat((first, left), dim=1)
