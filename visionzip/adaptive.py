"""How many tokens an image needs: fewer where few patches already reach the threshold.

Decided by the image alone, before anything is selected, so every selector and merge works with it and the tokens stay a pure
function of the image. Shapes as in `visionzip.compress`: ``B`` images, ``P`` patches (CLS not counted).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visionzip.compress import Compressed, compress_to_budget, listened, part
from visionzip.config import Adaptive, Measure, ZipConfig
from visionzip.selectors import Features, rows
from visionzip.selectors.coverage import cover, likeness


def held(features: Features, measure: Measure, most: int) -> Tensor:
    """``(B, most)`` float64, not decreasing: the share that ``1 … most`` patches hold of

    - ``attention``: all attention on patches, the patches with most of it first. O(P log P).
    - ``coverage``: what all patches would cover (`visionzip.selectors.coverage`), taken greedily. O(most · P²).
    """
    if measure == "attention":
        assert features.scores is not None  # Adaptive.needs_scores
        scores = features.scores[:, features.cls :].double()
        ranked = scores.sort(dim=1, descending=True).values
        return ranked[:, :most].cumsum(dim=1) / scores.sum(dim=1, keepdim=True).clamp(min=1e-12)
    near = likeness(features)
    steps = [covered.double().mean(dim=1) for _, covered in cover(near, near.new_ones(near.shape[:2]), most)]
    return torch.stack(steps, dim=1) if steps else near.new_zeros(len(near), 0, dtype=torch.float64)


def needed(shares: Tensor, adaptive: Adaptive, cls: int) -> Tensor:
    """``(B, most)`` of `held` → dominant tokens of each image ``(B,)`` int64, CLS included: the fewest that reach the threshold."""
    most = shares.shape[1]
    patches = (shares < adaptive.threshold).sum(dim=1) + 1
    return patches.clamp(min=min(max(adaptive.least - cls, 0), most), max=most) + cls


def dominant_of_each(features: Features, adaptive: Adaptive, most: int) -> list[int]:
    """Dominant tokens of each of ``B`` images, CLS included; `most`: what the budget allows."""
    return needed(held(features, adaptive.measure, most - features.cls), adaptive, features.cls).tolist()


def compress_each(features: Features, config: ZipConfig) -> list[Compressed]:
    """Compress each of ``B`` images to its own budget (`ZipConfig.adaptive`): batches of one.

    Images that keep equally many are compressed together. Somebody who listens gets them one by one, in their order.
    """
    assert config.adaptive is not None
    most, contextual = config.resolve(features.hidden_states.shape[1], reserved=features.cls)
    wanted = dominant_of_each(features, config.adaptive, most)
    groups: dict[Any, list[int]] = {}
    for place, count in enumerate(wanted):
        groups.setdefault((count, place) if listened() else count, []).append(place)
    found: dict[int, Compressed] = {}
    for places in groups.values():
        together = compress_to_budget(rows(features, places), config, (wanted[places[0]], contextual))
        found |= {place: part(together, number, number + 1) for number, place in enumerate(places)}
    return [found[place] for place in range(len(wanted))]


def calibrate(shares: Tensor, mean: float, adaptive: Adaptive, cls: int, contextual: int) -> tuple[float, float]:
    """A threshold at which images keep `mean` tokens on average or as few below as there can be, and the average it gives.

    Of all that give the same it is the middle one, so that no image here is decided by rounding.

    Args:
        shares: ``(images, most)`` of `held`.
        mean: tokens per image, CLS and contextual ones included.
        adaptive: of which `least` counts; its threshold is what is looked for.

    Raises:
        ValueError: where no threshold gives that few; or the most allowed is not more than `mean`.
    """

    def average(threshold: float) -> float:
        trial = adaptive.model_copy(update={"threshold": threshold})
        return needed(shares, trial, cls).double().mean().item() + contextual

    fewest, most = average(0.0), shares.shape[1] + cls + contextual
    if not fewest <= mean < most:
        raise ValueError(
            f"a mean of {mean:g} tokens is not possible: every image keeps {fewest:g} or more (adaptive.least, contextual) and "
            f"{most} at most (dominant + contextual); ask for a mean between them, or change these"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) <= mean else (low, middle)
    below = shares[shares < low]
    threshold = (low + (below.max().item() if len(below) else 0.0)) / 2
    rounded = round(threshold, 6)
    threshold = rounded if average(rounded) == average(low) else threshold
    return threshold, average(threshold)
