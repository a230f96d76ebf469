"""`pooled` and `scaled`: the controls that select nothing, and that a selector has to beat to be worth its name.

Both leave CLS out, since the model they stand for, the untouched one with fewer patches, does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visionzip.selectors.base import Features, selector


def cells(patches: int, count: int) -> tuple[list[int], list[int]]:
    """Divide a grid of `patches` into `count` cells of about equal size, in bands of about equally many.

    The grid is the squarest there is for so many patches.

    Returns:
        the cell of each patch, in raster order; the patch in the middle of each cell, ascending.
    """
    rows = next(rows for rows in range(math.isqrt(patches), 0, -1) if patches % rows == 0)
    columns = patches // rows
    bands = min(max(math.isqrt(count), -(-count // columns)), rows)
    cell_of, members = [], [([], []) for _ in range(count)]  # type: ignore[var-annotated]
    for row in range(rows):
        band = row * bands // rows
        first, last = band * count // bands, (band + 1) * count // bands
        for column in range(columns):
            cell = first + column * (last - first) // columns
            cell_of.append(cell)
            members[cell][0].append(row)
            members[cell][1].append(column)
    middle = [(min(r) + max(r)) // 2 * columns + (min(c) + max(c)) // 2 for r, c in members]
    return cell_of, middle


def scaled_grid(count: int) -> tuple[int, int]:
    """Rows and columns of the largest image of at most `count` patches that is about square: 64 → 8 × 8, 32 → 5 × 6."""
    rows = math.isqrt(count)
    return rows, count // rows


def pool(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Patches ``(B, P, D)`` → the mean of each of `count` cells ``(B, count, D)``, and the cell of each patch ``(P,)``."""
    cell = torch.tensor(cells(tokens.shape[1], count)[0], device=tokens.device)
    member = torch.nn.functional.one_hot(cell, count).to(torch.float32)  # (P, count)
    mean = (member / member.sum(dim=0)).t() @ tokens.float()
    return mean.to(tokens.dtype), cell


def middles(features: Features, keep: int) -> Tensor:
    """The patches in the middles of the cells."""
    batch, total = features.hidden_states.shape[:2]
    places = cells(total - features.cls, keep)[1] if keep else []
    return torch.tensor(places, dtype=torch.long, device=features.hidden_states.device).expand(batch, -1)


@selector("pooled", needs_scores=False, pools=True)
def pooled(features: Features, keep: int) -> Tensor:
    """The mean of the features in each cell of an even grid, in place of a selection. O(N·D)."""
    return middles(features, keep)


@selector("scaled", needs_scores=False, pools=True, scales=True)
def scaled(features: Features, keep: int) -> Tensor:
    """The untouched model on the image scaled down to as many patches as the budget: the encoder is cheaper too."""
    return middles(features, keep)
