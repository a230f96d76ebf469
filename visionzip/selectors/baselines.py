"""`random` and `uniform`: what any claim for a selector has to beat. Both ask for no attention. O(N)."""

from __future__ import annotations

import torch
from torch import Tensor

from visionzip.selectors.base import Features, selector

_MASK = 0xFFFFFFFF


def _scramble(values: Tensor) -> Tensor:
    """A 32-bit integer hash (MurmurHash3's finaliser) in int64, whose overflow keeps the low bits right."""
    values = values & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values = ((values ^ (values >> shift)) * factor) & _MASK
    return values ^ (values >> 16)


@selector("random", needs_scores=False, nested=True)
def random(features: Features, keep: int) -> Tensor:
    """Another random subset for every image, and the same one whenever that image is seen.

    The draw is seeded by the image's own tokens, rounded: no generator state, nothing that depends on batch or rank.
    On other hardware a token can fall on the other side of a rounding edge, and the image draws another subset.
    """
    patches = features.hidden_states[:, features.cls :].float()
    scale = patches.abs().mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    digest = (patches.mean(dim=2, keepdim=True) / scale * 64).round().long().squeeze(-1)  # (B, P)
    places = _scramble(torch.arange(1, digest.shape[1] + 1, device=digest.device))
    seed = _scramble(_scramble(digest + places).sum(dim=1, keepdim=True))  # (B, 1)
    order = _scramble(seed + places)
    return order.argsort(dim=1, stable=True)[:, :keep]


@selector("uniform", needs_scores=False)
def uniform(features: Features, keep: int) -> Tensor:
    """Every so many patches in raster order: the same places in every image."""
    batch, total = features.hidden_states.shape[:2]
    patches = total - features.cls
    places = (torch.arange(keep, device=features.hidden_states.device) * patches + patches // 2) // max(keep, 1)
    return places.clamp(max=patches - 1).expand(batch, -1)
