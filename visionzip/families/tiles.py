"""Images cut into tiles (anyres): how many there are, and the order in which their kept tokens reach the LLM.

Shapes: ``T`` tiles of one image, the first of them the whole image scaled down (the base), the others a grid of
``rows × columns``; ``K`` kept tokens per tile; ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from visionzip.compress import Compressed


def tile_grid(size: Sequence[int] | Tensor, pinpoints: Sequence[Sequence[int]], tile: int) -> tuple[int, int]:
    """``(rows, columns)`` of the grid an image is cut into, the base not counted.

    Args:
        size: ``(height, width)`` of the image in pixels.
        pinpoints: resolutions the model knows, each ``(height, width)``.
        tile: side of a tile in pixels.
    """
    height, width = [int(side) for side in size]  # a tensor would round differently (transformers says so too)
    best = select_best_resolution((height, width), [tuple(point) for point in pinpoints])
    return best[0] // tile, best[1] // tile


def pack_tiles(
    tokens: Tensor, kept: Tensor, contextual: int, grid: tuple[int, int], side: int, has_cls: bool
) -> Tensor:
    """The tiles of a grid as one sequence, as the authors order it for LLaVA-NeXT.

    Kept patches in raster order of the *stitched* image, then the tiles' CLS tokens, then their contextual tokens. Nothing
    is cropped and no newline is set: kept tokens form no rows.

    Args:
        tokens: ``(T, K, D)``, grid tiles in raster order, without the base.
        kept: ``(T, dominant)``, places among the encoder's tokens (`Compressed.kept`).
        contextual: how many of the ``K`` are contextual.
        grid: ``(rows, columns)``, with ``rows * columns == T``.
        side: patches along the side of a tile.

    Returns:
        ``(T * K, D)``.
    """
    rows, columns = grid
    count, budget = tokens.shape[:2]
    if rows * columns != count:
        raise ValueError(
            f"a grid of {rows} × {columns} tiles has {rows * columns}, but the tokens of {count} were given"
        )
    cls = int(has_cls)
    patch = kept[:, cls:] - cls  # (T, P)
    tile = torch.arange(count, device=kept.device).unsqueeze(1)
    row = tile // columns * side + patch // side
    column = tile % columns * side + patch % side
    order = (row * (columns * side) + column).flatten().argsort(stable=True)
    patches = tokens[:, cls : budget - contextual].flatten(0, 1)[order]
    return torch.cat((patches, tokens[:, :cls].flatten(0, 1), tokens[:, budget - contextual :].flatten(0, 1)))


def pack_image(tiles: Compressed, grid: tuple[int, int], side: int, has_cls: bool) -> Tensor:
    """All tiles of one image, base first: ``(T, K, D)`` → ``(T * K, D)``."""
    contextual = tiles.targets.shape[1]
    others = pack_tiles(tiles.tokens[1:], tiles.kept[1:], contextual, grid, side, has_cls)
    return torch.cat((tiles.tokens[0], others))
