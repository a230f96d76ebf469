"""The slow reference of families that make one token of a square of patches. Shares no code with the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.families import slow


def members(length: int, side: int) -> list[list[int]]:
    """For each group of a ``length × length`` grid of patches, in raster order, its patches."""
    per_row = length // side
    return [
        [row * length + column for row in range(r * side, (r + 1) * side) for column in range(c * side, (c + 1) * side)]
        for r in range(per_row)
        for c in range(per_row)
    ]


def last_layer(tower: Any, pixel_values: Tensor, attention: str, layers: str = "layers") -> tuple[Tensor, Tensor]:
    """The last layer's attention maps ``(B, H, N, N)`` and keys ``(B, N, H·d)`` of a tower that runs eager attention."""
    assert tower.config._attn_implementation == "eager"
    keys: list[Tensor] = []
    block = getattr(getattr(tower.encoder, layers)[-1], attention)
    handle = block.k_norm if hasattr(block, "k_norm") else block.k_proj
    handle = handle.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
    try:
        output = tower(pixel_values, output_attentions=True)
    finally:
        handle.remove()
    return output.attentions[-1], keys[0]


def given_to(module: Any, run: Any) -> Tensor:
    """What `module` is called with while `run` runs."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0]))
    try:
        run()
    finally:
        handle.remove()
    return found[0]


def compress(maps: Tensor, keys: Tensor, vectors: Tensor, side: int, cls: int, config: Any) -> list[Tensor]:
    """Tile by tile ``(K, C)``.

    Args:
        vectors: ``(T, n, C)``, what the projector would take.
        cls: tokens in front of the patches.
    """
    heads, length = maps.shape[1], round((maps.shape[2] - cls) ** 0.5)
    found = []
    for tile in range(len(vectors)):
        received = maps[tile].mean(0).mean(0)[cls:]
        mean_key = keys[tile].unflatten(-1, (heads, -1)).mean(1)[cls:]
        groups = members(length, side)
        scores = torch.stack([received[group].mean() for group in groups])
        metric = torch.stack([mean_key[group].mean(0) for group in groups])
        dominant, contextual = slow.budget(config, len(groups))
        found.append(slow.compress(vectors[tile], scores, metric, dominant, contextual, cls=False)[0])
    return found
