"""Frames of a video: placeholders, and what pooling does to the tokens of a frame.

Shapes: ``F`` frames, ``N`` patches of a frame in the encoder, ``P`` after pooling, ``K`` kept of them, ``D`` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import ZipConfig
from visionzip.selectors import Features


@dataclass
class FrameCount:
    """One budget per frame, and `extra` tokens per video."""

    budget: int
    extra: int = 0

    def of_input(self, inputs: Any, index: int) -> int:
        return self.of_size((len(inputs["pixel_values_videos"][index]),))

    def of_size(self, size: Any) -> int:
        return size[0] * self.budget + self.extra


def frame_budget(config: ZipConfig, tokens: int, reserved: int = 0) -> tuple[int, int]:
    """``(dominant, contextual)`` of a frame of `tokens` tokens after pooling.

    Raises:
        ValueError: where an image has enough tokens for the budget and a frame has not.
    """
    try:
        return config.resolve(tokens, reserved)
    except ValueError as error:
        raise ValueError(
            f"for the frames of a video, {error} Shares (dominant=0.1) suit both images and frames."
        ) from None


def bilinear_corners(side: int, pooled: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What ``F.interpolate(size=(pooled, pooled), mode="bilinear")`` makes of a grid of ``side × side``, as sums of four.

    Returns:
        ``(P, 4)`` int64 places of the four patches each pooled one is made of, and their ``(P, 4)`` float32 weights.
    """
    centre = ((torch.arange(pooled, device=device) + 0.5) * (side / pooled) - 0.5).clamp(min=0)
    low = centre.floor().long().clamp(max=side - 1)
    high = (low + 1).clamp(max=side - 1)
    share = (centre - low).float()  # of `high`
    ends, weights = torch.stack((low, high), dim=1), torch.stack((1 - share, share), dim=1)  # (pooled, 2) each
    places = ends[:, None, :, None] * side + ends[None, :, None, :]  # (pooled, pooled, 2, 2)
    shares = weights[:, None, :, None] * weights[None, :, None, :]
    return places.reshape(-1, 4), shares.reshape(-1, 4)


def pool(features: Features, places: Tensor, weights: Tensor) -> Features:
    """Pooled positions as the tokens to choose from: the four patches of each side by side, scores and keys pooled.

    The patches themselves are not pooled here, because the projector stands between encoder and pooling and is no linear map.

    Returns:
        Features of ``(F, P, 4·D)`` hidden states, ``(F, P, d)`` keys and ``(F, P)`` scores.
    """
    count = places.shape[0]
    hidden = features.hidden_states[:, places.flatten()].unflatten(1, (count, 4)).flatten(2)
    keys = (features.metric[:, places.flatten()].unflatten(1, (count, 4)) * weights.unsqueeze(-1)).sum(2)
    scores = features.scores
    scores = None if scores is None else (scores[:, places.flatten()].unflatten(1, (count, 4)) * weights).sum(2)
    return Features(hidden, keys.to(features.metric.dtype), scores, has_cls=False)


def stacked(embeddings: list[Tensor]) -> BaseModelOutputWithPooling:
    """One tensor ``(images, L, hidden)``, for models that take no list; images of different length in one row."""
    same = len({len(one) for one in embeddings}) == 1
    return BaseModelOutputWithPooling(pooler_output=torch.stack(embeddings) if same else torch.cat(embeddings)[None])
