"""`dpp` and `cdpruner`: the most likely subset of a determinantal point process (CDPruner, NeurIPS 2025, arXiv 2506.10967, section 3).

CDPruner conditions the process on the question. Without text there are two forms: on nothing (`dpp`), and on what the encoder attends
to (`cdpruner`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.selectors.base import Features, selector


def greedy_map(tokens: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """Greedily maximise ``det(L)`` of the chosen, ``L = diag(r) · S · diag(r)`` with ``S`` the cosines of the tokens.

    A patch multiplies the determinant by ``r² · |what of its unit vector the chosen ones do not span|²``, so the step is
    Gram–Schmidt on the tokens themselves: O(N·D) a step and no ``N × N`` matrix. It gives what Chen et al. 2018 (arXiv
    1709.05135) take from a Cholesky factor. Factors are rounded to 1e-4, the first of equals is taken; where the chosen ones
    span all the rest (every determinant is 0), the more relevant first.

    Shapes: tokens ``(B, P, D)``, relevance ``(B, P)`` in [0, 1] → ``(B, keep)``, the first taken first.
    """
    left = F.normalize(tokens.float(), dim=-1)
    batch, patches, width = left.shape
    chosen = torch.empty(batch, keep, dtype=torch.long, device=left.device)
    taken = torch.zeros(batch, patches, dtype=torch.bool, device=left.device)
    for step in range(keep):
        factor = (relevance.square() * left.square().sum(dim=-1) * 1e4).round_()
        best = torch.where(factor > 0, factor, relevance - 1.0).masked_fill(taken, -2.0).argmax(dim=1, keepdim=True)
        chosen[:, step : step + 1] = best
        taken.scatter_(1, best, True)
        axis = left.gather(1, best.unsqueeze(-1).expand(-1, -1, width))  # (B, 1, D)
        length = axis.norm(dim=-1, keepdim=True)
        axis = torch.where(length > 1e-3, axis / length.clamp(min=1e-3), torch.zeros_like(axis))
        left = left - (left @ axis.transpose(1, 2)) * axis
    return chosen


@selector("dpp", needs_scores=False, nested=True)
def dpp(features: Features, keep: int) -> Tensor:
    """The process conditioned on nothing: all patches are equally relevant. O(K·N·D)."""
    tokens = features.hidden_states[:, features.cls :]
    return greedy_map(tokens, torch.ones(tokens.shape[:2], device=tokens.device), keep)


@selector("cdpruner", needs_scores=True, nested=True)
def cdpruner(features: Features, keep: int) -> Tensor:
    """Conditioned on the attention a patch gets, scaled to [0, 1] over the image as the paper scales the question's relevance.

    O(K·N·D).
    """
    assert features.scores is not None  # needs_scores
    scores = features.scores[:, features.cls :].float()
    least, most = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    relevance = (scores - least) / (most - least).clamp(min=1e-12)
    return greedy_map(features.hidden_states[:, features.cls :], relevance, keep)
