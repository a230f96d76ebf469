"""What an engine hands on about images, in tensors: each image's own part of a batch, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionzip.budgets import at_budget
from visionzip.config import ZipConfig

#: name of the field that goes with the pixels of each image or video (``{}``: its kind)
KEPT = "visionzip_{}"
#: the inputs of ``forward`` of one image: name → tensor
Item = dict[str, Tensor]


def pack_budget(config: ZipConfig, tokens: int) -> Tensor:
    """``(5,)`` float64: dominant and contextual, whether each is a share, and placeholders in the prompt."""
    budget = (config.dominant, config.contextual)
    return torch.tensor([*budget, *(isinstance(value, float) for value in budget), tokens], dtype=torch.float64)


def unpack_budget(packed: Tensor, own: ZipConfig) -> tuple[ZipConfig, int]:
    """`pack_budget`'s arguments again; selector, merge and all else are `own`'s."""
    *budget, first, second, tokens = packed.tolist()
    dominant, contextual = (
        float(value) if share else int(value) for value, share in zip(budget, (first, second), strict=True)
    )
    return at_budget(own, (dominant, contextual)), int(tokens)


def split_items(inputs: dict[str, Any], rows: Sequence[int]) -> list[Item]:
    """Inputs of a batch → of each image.

    Args:
        inputs: name → tensor with all images on dim 0, or a list with one tensor per image where their shapes differ.
        rows: rows of the first input (its pixels) that each image has: 1, its tiles, or its patches. Other inputs have as many
            rows, or one per image.

    Raises:
        ValueError: when rows are left over or missing.
    """
    items: list[Item] = [{} for _ in rows]
    for name, value in inputs.items():
        if isinstance(value, Tensor) and len(value) == sum(rows):
            parts: Sequence[Tensor] = value.split(list(rows))
        elif isinstance(value, Tensor) and len(value) == len(rows):
            parts = value.split(1)
        elif not isinstance(value, Tensor) and len(value) == len(rows):
            parts = [part if len(part) == count else part.unsqueeze(0) for part, count in zip(value, rows, strict=True)]
        else:
            raise ValueError(f"{name} has {len(value)} rows, which are not those of {len(rows)} images ({list(rows)})")
        for item, part in zip(items, parts, strict=True):
            item[name] = part
    return items


def batch_items(items: Sequence[Item]) -> Item:
    """`split_items` undone, for images that go through the encoder together. Tiles are padded with zeros to the largest number."""
    return {name: _joined([item[name] for item in items]) for name in items[0]}


def _joined(parts: list[Tensor]) -> Tensor:
    tiles = max(part.shape[1] if part.dim() > 1 else 0 for part in parts)
    if parts[0].dim() == 5 and any(part.shape[1] < tiles for part in parts):
        parts = [
            torch.cat((part, part.new_zeros(len(part), tiles - part.shape[1], *part.shape[2:])), dim=1)
            for part in parts
        ]
    return torch.cat(parts)
