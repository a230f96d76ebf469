"""Plots for one image: the distribution of its attention, and the attention covered by each budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from visionzip.analysis import redundancy
from visionzip.analysis.style import BLUE, QUIET, SKY, VERMILION, log_of_two, new_figure, whole_ticks
from visionzip.analysis.trace import Tile


def histogram(tiles: Sequence[Tile], what: str = "image") -> Any:
    """The distribution of attention over patches, and the share the kept ones receive; all tiles or frames together.

    Raises:
        ValueError: where there are no scores.
    """
    shares = [(tile.attention * tile.patches).flatten().numpy() for tile in tiles if tile.attention is not None]
    if len(shares) < len(tiles):
        raise ValueError("this model gave no attention scores, so there is no histogram to draw")
    times = np.concatenate(shares)
    kept = np.concatenate([tile.kept_mask.flatten().numpy() for tile in tiles])
    held = sum(float(tile.held or 0) for tile in tiles) / len(tiles)
    low, high = max(float(times.min()), 1 / 64), max(float(times.max()), 2.0)
    bins = np.geomspace(min(low, 0.5) * 0.999, high * 1.001, 28)
    figure, axes = new_figure(6.4, 3.7)
    axes.hist(
        [np.clip(times[kept], bins[0], None), np.clip(times[~kept], bins[0], None)], bins=bins, stacked=True,
        color=[VERMILION, SKY], label=[f"kept: {kept.sum()} patches, {held:.0%} of the attention",
                                       f"merged or dropped: {(~kept).sum()} patches, {1 - held:.0%}"],
    )  # fmt: skip
    log_of_two(axes)
    axes.set(xlabel=f"attention a patch has, in multiples of the {what}'s average", ylabel="patches")
    whole_ticks(axes.yaxis)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left")
    return figure


def budget_curve(tile: Tile) -> Any:
    """The attention that the most attended 0, 1, 2 … patches of a tile receive together, and where its budget lies.

    Raises:
        ValueError: where there are no scores.
    """
    if tile.attention is None or tile.held is None:
        raise ValueError("this model gave no attention scores, so there is no curve to draw")
    held = 100 * redundancy.cumulative(tile.attention.flatten()).numpy()
    keep = int(tile.kept_mask.sum())
    figure, axes = new_figure(6.4, 3.7)
    axes.plot(np.arange(len(held)), held, color=BLUE, linewidth=2.2, label="most attended patches first")
    axes.plot(
        [0, len(held) - 1], [0, 100], color=QUIET, linewidth=1.2, linestyle="--", label="if all patches were alike"
    )
    axes.plot(keep, 100 * tile.held, "o", color=VERMILION, markersize=9, label=f"kept: {keep} patches, {tile.held:.0%}")
    axes.set(xlabel="patches kept", ylabel="attention held, %", xlim=(0, len(held) - 1), ylim=(0, 102))
    whole_ticks(axes.xaxis)
    axes.legend(loc="lower right")
    return figure
