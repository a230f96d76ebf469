"""`mmtok`: the vision part of MMTok (ICLR 2026, arXiv 2508.18264, section 3): maximum coverage of the image by a few of its tokens."""

from __future__ import annotations

from torch import Tensor

from visionzip.selectors.base import Features, selector
from visionzip.selectors.coverage import cosines, greedy_cover

TEMPERATURE = 0.2  # of similarities between visual tokens; the authors' default


@selector("mmtok", needs_scores=False, nested=True)
def rank(features: Features, keep: int) -> Tensor:
    """Greedy maximum coverage of all patches; how well a patch is covered by each is a softmax of the cosines.

    A patch with many likes is covered a little by each of them, and one that stands alone by itself, which is the difference to
    `coverage`. The paper's other half, covering the words of the question, is left out: visual tokens would no longer be a
    function of the image alone. O(K·N²).
    """
    shares = cosines(features).div_(TEMPERATURE).softmax(dim=-1)
    return greedy_cover(shares, shares.new_ones(shares.shape[:2]), keep)
