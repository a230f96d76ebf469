"""`coverage` and `focus`: greedy facility location, each new patch the one that best covers what is not covered yet."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.selectors.base import Features, selector


def greedy_cover(likeness: Tensor, weights: Tensor, keep: int) -> Tensor:
    """Maximise ``Σ_i weight_i · max_{j taken} likeness_ij`` greedily, which is within 1 − 1/e of the best subset.

    Shapes: likeness ``(B, P, P)`` in [0, 1], how well each patch (rows) is covered by each (columns); weights ``(B, P)`` →
    ``(B, keep)``, the first taken first. O(N²) a step.
    """
    chosen = [best for best, _ in cover(likeness, weights, keep)]
    return torch.cat(chosen, dim=1) if chosen else likeness.new_zeros(len(weights), 0, dtype=torch.long)


def cover(likeness: Tensor, weights: Tensor, keep: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps of `greedy_cover`: the patch taken ``(B, 1)``, and how well each patch is covered by then ``(B, P)``.

    Gains are rounded to 1e-4 of an average patch, so that rounding does not decide between equals: the first one is taken.
    """
    batch, patches = weights.shape
    weights = weights / weights.mean(dim=1, keepdim=True).clamp(min=1e-12)
    covered = torch.zeros_like(weights)
    taken = torch.zeros(batch, patches, dtype=torch.bool, device=weights.device)
    for _ in range(keep):
        gain = torch.einsum("bp,bpj->bj", weights, (likeness - covered.unsqueeze(-1)).clamp_(min=0.0))
        gain = (gain * 1e4).round_()
        best = gain.masked_fill(taken, -1.0).argmax(dim=1, keepdim=True)
        taken.scatter_(1, best, True)
        by_best = likeness.gather(2, best.unsqueeze(1).expand(-1, patches, -1)).squeeze(2)
        covered = torch.maximum(covered, by_best)
        yield best, covered


def cosines(features: Features) -> Tensor:
    """``(B, P, P)``: cosine of patches' tokens."""
    tokens = F.normalize(features.hidden_states[:, features.cls :].float(), dim=-1)
    return tokens @ tokens.transpose(1, 2)


def likeness(features: Features) -> Tensor:
    """``(B, P, P)``: cosine of patches' tokens, negative ones as 0."""
    return cosines(features).clamp_(0.0, 1.0)


@selector("coverage", needs_scores=False, nested=True)
def coverage(features: Features, keep: int) -> Tensor:
    """Every patch counts the same. Submodular coverage (Nemhauser et al. 1978) of the tokens by cosine. O(K·N²)."""
    near = likeness(features)
    return greedy_cover(near, near.new_ones(near.shape[:2]), keep)


@selector("focus", needs_scores=True, nested=True)
def focus(features: Features, keep: int) -> Tensor:
    """Importance and coverage in one: a patch counts as much as attention points at it, and is covered by its likes.

    A patch like one already taken adds little although it scores high, which is what `visionzip` spends budget on. O(K·N²).
    """
    assert features.scores is not None  # needs_scores
    return greedy_cover(likeness(features), features.scores[:, features.cls :].float(), keep)
