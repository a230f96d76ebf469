"""Measures of how few tokens receive most of the attention, computed on shares with one row per image or tile.

Shapes: ``P`` patches, ``L`` layers; shares are non-negative and sum to 1 over the patches. Source: figures 2 (attention is
concentrated on a few tokens) and 5 (more so in deeper layers) of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = (0.80, 0.90, 0.95)
POINTS = 100
"""Cumulative curves are kept at 0 %, 1 % … 100 % of the patches, so that images of all sizes can be averaged."""


def cumulative(shares: Tensor) -> Tensor:
    """``(…, P)`` → ``(…, P + 1)``: the attention that the 0, 1 … P most attended patches receive together."""
    held = shares.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return torch.nn.functional.pad(held, (1, 0)).clamp(max=1.0)


def budget_for(shares: Tensor, level: float) -> Tensor:
    """The smallest number of patches that receive at least `level` of the attention: ``(…, P)`` → ``(…,)`` int64."""
    # A sum of float32 shares is inexact; without this tolerance 100 % might never be reached.
    return (cumulative(shares) < level - 1e-6).sum(dim=-1)


def sample_curve(shares: Tensor) -> Tensor:
    """``(…, P)`` → ``(…, POINTS + 1)``: `cumulative` at whole per cents of the patches, linear in between."""
    held = cumulative(shares)
    place = torch.linspace(0, shares.shape[-1], POINTS + 1)
    low = place.floor().long().clamp(max=shares.shape[-1] - 1)
    share = place - low
    return held[..., low] * (1 - share) + held[..., low + 1] * share


def effective_patches(shares: Tensor) -> Tensor:
    """exp(entropy): the number of equally attended patches with the same spread. ``(…, P)`` → ``(…,)``, in [1, P]."""
    return torch.special.entr(shares).sum(dim=-1).exp()


def top_share(shares: Tensor, share: float = 0.1) -> Tensor:
    """Attention received by the most attended `share` of the patches: ``(…, P)`` → ``(…,)``."""
    return cumulative(shares)[..., max(1, round(shares.shape[-1] * share))]


def agreement(layers: Tensor, keep: int) -> Tensor:
    """The share of one layer's `keep` most attended patches that are among another layer's: ``(L, P)`` → ``(L, L)``.

    1 on the diagonal, ``keep / P`` on average for two unrelated layers.
    """
    chosen = torch.zeros_like(layers).scatter_(
        -1, layers.argsort(dim=-1, descending=True, stable=True)[..., :keep], 1.0
    )
    return chosen @ chosen.transpose(-1, -2) / keep
