"""The threshold at which images keep a wanted number of tokens on average, found on images like those to come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visionzip.adaptive import calibrate, held, needed
from visionzip.analysis.trace import image_inputs
from visionzip.attach import Attachment
from visionzip.compress import listening
from visionzip.config import Adaptive, ZipConfig
from visionzip.inputs import to_model


@dataclass(frozen=True)
class Calibrated:
    """`config` has the threshold. `counts` ``(tiles,)``: tokens of each image looked at (LLaVA-NeXT: of each of its tiles)."""

    config: ZipConfig
    mean: float
    counts: Tensor


def calibrated(
    attachment: Attachment,
    processor: Any,
    images: Iterable[Image.Image],
    mean: float,
    adaptive: Adaptive,
) -> Calibrated:
    """Per-image budgets (per tile, where there are tiles) with a mean of `mean` tokens or a little fewer, over `images`.

    Args:
        attachment: its config says the most an image keeps, and all else; its family must support per-image budgets.
        adaptive: measure and least; its threshold does not count.

    Raises:
        ValueError: for a family without such budgets, no images, or a mean that can't be had.
    """
    model, config, family = attachment.model, attachment.config, attachment.family
    if not family.per_image_budgets:
        raise ValueError(f"{type(model).__name__} does not support per-image budgets; LLaVA-1.5 and LLaVA-NeXT do")
    dominant, contextual = family.budget(config)
    plain = config.model_copy(update={"adaptive": None})
    found: list[Tensor] = []
    with listening(lambda features, _: found.append(held(features, adaptive.measure, dominant - features.cls).cpu())):
        for image in images:
            inputs = to_model(model, image_inputs(processor, image, config.pad_images))
            family.compress(plain, **inputs)
    if not found:
        raise ValueError("there is no readable image to calibrate on")
    shares = torch.cat(found)
    cls = dominant - shares.shape[1]
    threshold, average = calibrate(shares, mean, adaptive, cls, contextual)
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"a mean of {mean:g} tokens needs no threshold: every image keeps that few; ask for more")
    chosen = adaptive.model_copy(update={"threshold": threshold})
    counts = needed(shares, chosen, cls) + contextual
    return Calibrated(config.model_copy(update={"adaptive": chosen}), average, counts)
