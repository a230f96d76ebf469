"""Qwen's selection and positions, one frame, one group and one token at a time. Shares no code with the library."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.families import slow


def last_maps(model: Any, pixels: Tensor, grid: Tensor, kind: str) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """For each frame the last block's attention map ``(H, N, N)`` and rotated keys ``(H, N, d)``, in the block's own order,
    and what the untouched model makes of the pixels. It must run with eager attention, frame by frame.
    """
    tower = model.model.visual
    assert tower.config._attn_implementation == "eager"
    home = importlib.import_module(type(tower).__module__)
    stock, found = home.eager_attention_forward, []

    def watch(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output, weights = stock(module, query, key, *args, **kwargs)
        if module is tower.blocks[-1].attn:
            found.append((weights[0], key[0]))
        return output, weights

    with mock.patch.object(home, "eager_attention_forward", watch):
        output = getattr(model.model, f"get_{kind}_features")(pixels, grid)
    return found, output


def window_order(rows: int, columns: int, side: int | None) -> list[int]:
    """Groups of a frame of rows × columns groups in the order of windows of side × side; without windows as they are."""
    if side is None:
        return list(range(rows * columns))
    order = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            for row in range(top, min(top + side, rows)):
                order += [row * columns + column for column in range(left, min(left + side, columns))]
    return order


def choose(model: Any, grid: list[int], maps: list[tuple[Tensor, Tensor]], config: Any) -> list[tuple[list[int], dict]]:
    """For each frame of one image: the dominant groups and, target by target, the members."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    rows, columns = grid[1] // merge, grid[2] // merge
    side = vision.window_size // merge // vision.patch_size if hasattr(vision, "window_size") else None
    order = window_order(rows, columns, side)
    result = []
    for attention, keys in maps:
        received, mean_key = attention.mean(0).mean(0), keys.mean(0)
        scores, metric = torch.zeros(rows * columns), torch.zeros(rows * columns, keys.shape[-1])
        for position, group in enumerate(order):
            patches = range(position * merge**2, (position + 1) * merge**2)
            scores[group] = sum(received[patch] for patch in patches) / merge**2
            metric[group] = sum(mean_key[patch] for patch in patches) / merge**2
        dominant, contextual = slow.budget(config, rows * columns)
        result.append(slow.choose(scores, metric, dominant, contextual, cls=False))
    return result


def compressed(
    embeddings: Tensor, chosen: list[tuple[list[int], dict]], deep: bool = False
) -> tuple[Tensor, list[list[int]]]:
    """``(frames · n, hidden)`` merged groups of one image → its tokens, and for each frame the places they stand at.

    `deep`: targets stay as they are.
    """
    per_frame = len(embeddings) // len(chosen)
    rows, places = [], []
    for frame, (kept, members) in enumerate(chosen):
        here = embeddings[frame * per_frame :]
        token = {group: here[group] for group in kept}
        for target, others in members.items():
            token[target] = here[target]
            if others and not deep:
                token[target] = here[target] + torch.stack([here[other] for other in others]).mean(0)
        places.append(sorted(token))
        rows += [token[place] for place in sorted(token)]
    return torch.stack(rows), places


def positions(
    kinds: list[list[int]], visible: list[list[bool]], images: dict[int, list[dict[str, Any]]], apart: bool
) -> Tensor:
    """``(3, B, L)`` positions of rows whose images keep some places only.

    Args:
        kinds: for each token 0 (text), 1 (of an image), 2 (of a video).
        images: kind → one an image: ``rows``, ``columns`` (groups), ``places`` (for each frame), ``step`` (of time).
        apart: each frame of a video is a run of its own, at time 0.
    """
    runs = {kind: [] for kind in (1, 2)}
    for kind, found in images.items():
        for image in found:
            frames = image["places"]
            split = apart and kind == 2
            runs[kind] += [(image, [frame]) for frame in frames] if split else [(image, frames)]
    result = torch.zeros(3, len(kinds), len(kinds[0]), dtype=torch.long)
    for number, row in enumerate(kinds):
        following, place = 0, 0
        while place < len(row):
            if not visible[number][place]:
                place += 1
            elif row[place] == 0:
                result[:, number, place] = following
                following, place = following + 1, place + 1
            else:
                image, frames = runs[row[place]].pop(0)
                for time, kept in enumerate(frames):
                    for group in kept:
                        where = (int(time * image["step"]), *divmod(group, image["columns"]))
                        result[:, number, place] = following + torch.tensor(where)
                        place += 1
                following += max(image["rows"], image["columns"])
    return result
