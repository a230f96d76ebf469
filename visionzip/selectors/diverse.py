"""`divprune`: the patches that differ most from one another (DivPrune, CVPR 2025, arXiv 2503.02175)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.selectors.base import Features, selector


@selector("divprune", needs_scores=False, nested=True)
def rank(features: Features, keep: int) -> Tensor:
    """Greedy max–min distance of the tokens themselves (cosine); needs no attention at all.

    First the patch whose nearest neighbour is farthest, then again and again the one farthest from all that were taken.
    O(N²·D) once and O(N) a step; ``B × N × N`` floats of memory. Paper, section 3.
    """
    tokens = F.normalize(features.hidden_states[:, features.cls :].float(), dim=-1)
    distance = 1.0 - tokens @ tokens.transpose(1, 2)  # (B, P, P)
    batch, patches = distance.shape[:2]
    own = torch.eye(patches, dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(own, float("inf")).amin(dim=2)  # (B, P)
    chosen = torch.empty(batch, keep, dtype=torch.long, device=distance.device)
    taken = torch.zeros(batch, patches, dtype=torch.bool, device=distance.device)
    for step in range(keep):
        best = nearest.masked_fill(taken, -float("inf")).argmax(dim=1, keepdim=True)  # (B, 1)
        chosen[:, step : step + 1] = best
        taken.scatter_(1, best, True)
        row = distance.gather(1, best.unsqueeze(-1).expand(-1, -1, patches)).squeeze(1)
        nearest = row if step == 0 else torch.minimum(nearest, row)
    return chosen
