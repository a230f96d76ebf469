"""`coverage` and `focus`: greedy facility location, each new patch the one that best covers what is not covered yet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.selectors.base import Features, selector


def greedy_cover(likeness: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Maximise ``Σ_i weight_i · max_{j taken} likeness_ij`` greedily, which is within 1 − 1/e of the best subset.

    Shapes: likeness ``(B, P, P)`` in [0, 1], weights ``(B, P)`` → ``(B, keep)`` ascending. O(N²) a step.
    Gains are rounded to 1e-4 of an average patch, so that rounding does not decide between equals: the first one is taken.
    """
    batch, patches = weights.shape
    weights = weights / weights.mean(dim=1, keepdim=True).clamp(min=1e-12)
    covered = torch.zeros_like(weights)
    taken = torch.zeros(batch, patches, dtype=torch.bool, device=weights.device)
    chosen = torch.empty(batch, keep, dtype=torch.long, device=weights.device)
    for step in range(keep):
        gain = torch.einsum("bp,bpj->bj", weights, (likeness - covered.unsqueeze(-1)).clamp_(min=0.0))
        gain = (gain * 1e4).round_()
        best = gain.masked_fill(taken, -1.0).argmax(dim=1, keepdim=True)
        chosen[:, step : step + 1] = best
        taken.scatter_(1, best, True)
        row = likeness.gather(1, best.unsqueeze(-1).expand(-1, -1, patches)).squeeze(1)
        covered = torch.maximum(covered, row)
    return chosen.sort(dim=1).values


def _likeness(features: Features) -> Tensor:
    tokens = F.normalize(features.hidden_states[:, features.cls :].float(), dim=-1)
    return (tokens @ tokens.transpose(1, 2)).clamp_(0.0, 1.0)


@selector("coverage", needs_scores=False)
def coverage(features: Features, keep: int) -> Tensor:
    """Every patch counts the same. Submodular coverage (Nemhauser et al. 1978) of the tokens by cosine. O(K·N²)."""
    likeness = _likeness(features)
    return greedy_cover(likeness, likeness.new_ones(likeness.shape[:2]), keep)


@selector("focus", needs_scores=True)
def focus(features: Features, keep: int) -> Tensor:
    """Importance and coverage in one: a patch counts as much as attention points at it, and is covered by its likes.

    A patch like one already taken adds little although it scores high, which is what `visionzip` spends budget on. O(K·N²).
    """
    assert features.scores is not None  # needs_scores
    return greedy_cover(_likeness(features), features.scores[:, features.cls :].float(), keep)
