"""VISIONZIP's steps one image and one token at a time, on eager attention maps. Shares no code with the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def budget(config: Any, tokens: int) -> tuple[int, int]:
    """A budget in tokens: an int as it is, a share truncated, and one token of it at least."""
    return tuple(
        value if isinstance(value, int) or value == 0 else max(1, int(value * tokens))
        for value in (config.dominant, config.contextual)
    )  # type: ignore[return-value]


def encode(tower: Any, pixel_values: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``(B, N, D)``, attention map ``(B, H, N, N)`` and keys ``(B, N, H·d)`` of the layer that is read.

    `layer` as in ``hidden_states[layer]``. The tower must run with eager attention.
    """
    assert tower.config._attn_implementation == "eager"
    keys: list[Tensor] = []
    number = layer if layer >= 0 else len(tower.encoder.layers) + 1 + layer
    block = tower.encoder.layers[number - 1]
    handle = block.self_attn.k_proj.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
    try:
        output = tower(pixel_values, output_hidden_states=True, output_attentions=True)
    finally:
        handle.remove()
    return output.hidden_states[number], output.attentions[number - 1], keys[0]


def choose(
    scores: Tensor, metric: Tensor, dominant: int, contextual: int, cls: bool
) -> tuple[list[int], dict[int, list[int]]]:
    """Of one image the kept places, and each target's members.

    Args:
        scores: ``(N,)``, of CLS no matter.
        metric: ``(N, d)``.
    """
    first = 1 if cls else 0
    total = len(scores)
    ranked = sorted(range(first, total), key=lambda token: (-float(scores[token]), token))
    kept = sorted([*range(first), *ranked[: dominant - first]])
    rest = [token for token in range(total) if token not in set(kept)]
    if contextual == 0:
        return kept, {}
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    members: dict[int, list[int]] = {target: [] for target in targets}
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for token in rest:
        if token not in members:
            members[targets[int((unit[targets] @ unit[token]).argmax())]].append(token)
    return kept, members


def compress(
    hidden: Tensor, scores: Tensor, metric: Tensor, dominant: int, contextual: int, cls: bool
) -> tuple[Tensor, list[int]]:
    """``(N, D)`` → ``(dominant + contextual, D)`` and the kept places. Merged: target + mean of its members."""
    kept, members = choose(scores, metric, dominant, contextual, cls)
    rows = [hidden[token] for token in kept]
    for target, group in members.items():
        rows.append(
            hidden[target] + torch.stack([hidden[token] for token in group]).mean(0) if group else hidden[target]
        )
    return torch.stack(rows), kept


def clip_tiles(
    tower: Any, pixel_values: Tensor, layer: int, dominant: int, contextual: int
) -> list[tuple[Tensor, list[int]]]:
    """Each of ``(B, 3, h, w)`` on its own: scores are CLS's row, summed over heads; the metric is the mean key."""
    hidden, maps, keys = encode(tower, pixel_values, layer)
    heads = maps.shape[1]
    return [
        compress(
            hidden[i], maps[i, :, 0].sum(0), keys[i].unflatten(-1, (heads, -1)).mean(1), dominant, contextual, True
        )
        for i in range(len(hidden))
    ]


def raster(kept: list[list[int]], columns: int, side: int, cls: bool) -> list[tuple[int, int]]:
    """Over a grid of tiles, which (tile, place within its kept tokens) comes when: row by row of the stitched image."""
    first = 1 if cls else 0
    where = {}
    for tile, places in enumerate(kept):
        for place, token in enumerate(places[first:], start=first):
            patch = token - first
            row, column = tile // columns * side + patch // side, tile % columns * side + patch % side
            where[(row, column)] = (tile, place)
    return [where[spot] for spot in sorted(where)]
