"""The threshold at which pictures keep a wanted number of tokens on average, found on pictures like those to come."""

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
    """`config` has the threshold. `counts` ``(tiles,)``: tokens of each picture looked at (LLaVA-NeXT: of each of its tiles)."""

    config: ZipConfig
    mean: float
    counts: Tensor


def calibrated(
    attachment: Attachment,
    processor: Any,
    pictures: Iterable[Image.Image],
    mean: float,
    adaptive: Adaptive,
) -> Calibrated:
    """Budgets of each picture's own with `mean` tokens a picture (a tile) or a little fewer, over `pictures`.

    Args:
        attachment: its config says the most a picture keeps, and all else; a picture with budgets of its own must be possible.
        adaptive: measure and least; its threshold does not count.

    Raises:
        ValueError: for a family without such budgets, no pictures, or a mean that can't be had.
    """
    model, config, family = attachment.model, attachment.config, attachment.family
    if not family.per_image_budgets:
        raise ValueError(f"{type(model).__name__} does not support per-image budgets; LLaVA-1.5 and LLaVA-NeXT do")
    dominant, contextual = family.budget(config)
    plain = config.model_copy(update={"adaptive": None})
    found: list[Tensor] = []
    with listening(lambda features, _: found.append(held(features, adaptive.measure, dominant - features.cls).cpu())):
        for picture in pictures:
            inputs = to_model(model, image_inputs(processor, picture, config.pad_images))
            family.compress(plain, **inputs)
    if not found:
        raise ValueError("there is no readable picture to calibrate on")
    shares = torch.cat(found)
    cls = dominant - shares.shape[1]
    threshold, average = calibrate(shares, mean, adaptive, cls, contextual)
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"a mean of {mean:g} tokens needs no threshold: every picture keeps that few; ask for more")
    chosen = adaptive.model_copy(update={"threshold": threshold})
    counts = needed(shares, chosen, cls) + contextual
    return Calibrated(config.model_copy(update={"adaptive": chosen}), average, counts)
