"""`visionzip`: the patches that the encoder's own attention points at (paper, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from visionzip.selectors.base import Features, selector


@selector("visionzip", needs_scores=True, nested=True)
def rank(features: Features, keep: int) -> Tensor:
    """The `keep` highest scores. O(N log N); equal scores are taken in raster order, so that every device agrees.

    Shapes: scores ``(B, N)`` → patch indices ``(B, keep)``, the highest first.
    """
    assert features.scores is not None  # needs_scores
    scores = features.scores[:, features.cls :]
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :keep]
