"""A survey as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from data.inspect.survey import Survey
from visionzip.analysis.style import BLUE, GREEN, ORANGE, QUIET, VERMILION, new_figure, save_figure, style, whole_ticks


def draw_survey(result: Survey, longest: int, path: Path) -> None:
    with style():
        figure, ((length, images), (share, rejected)) = new_figure(11, 7.5, nrows=2, ncols=2)
        counts = (len(result.facts), "used"), (len(result.rejections), "rejected"), (len(result.cut), "cut")
        title = f"{result.read:,} records: {', '.join(f'{count:,} {what}' for count, what in counts)}"
        figure.suptitle(title, x=0.012, ha="left")
        draw_lengths(length, result, longest)
        images_per_sample(images, result)
        draw_supervised(share, result)
        draw_reasons(rejected, result)
        for axes in (length, images, share):
            whole_ticks(axes.yaxis)
        save_figure(figure, path, dpi=120)


def draw_lengths(axes: Axes, result: Survey, longest: int) -> None:
    bins: Any = np.linspace(0, max(int(result.column("total").max(initial=1)), 1), 41)
    for name, colour, label in (("total", BLUE, "total"), ("text", ORANGE, "text"), ("image", GREEN, "images")):
        axes.hist(result.column(name), bins=bins, color=colour, histtype="step", linewidth=1.8, label=label)
    if bins[-1] > 0.8 * longest:
        axes.axvline(longest, color=QUIET, linestyle=":", label=f"max_length {longest:,}")
    axes.set(title="Length", xlabel="tokens per sample", ylabel="samples")
    axes.legend()


def images_per_sample(axes: Axes, result: Survey) -> None:
    values, counts = np.unique(result.column("images"), return_counts=True)
    axes.bar(values, counts, color=GREEN, width=0.8)
    axes.set(title="Images", xlabel="images per sample", ylabel="samples")
    whole_ticks(axes.xaxis)
    if len(values) and values.max() < 3:
        axes.set_xlim(-0.75, 3.75)


def draw_supervised(axes: Axes, result: Survey) -> None:
    total = result.column("total")
    axes.hist(result.column("supervised") / np.maximum(total, 1), bins=np.linspace(0, 1, 41).tolist(), color=BLUE)
    axes.axvline(
        result.supervised_share(),
        color=VERMILION,
        linestyle="--",
        label=f"{result.supervised_share():.1%} of all tokens",
    )
    axes.set(title="Supervised", xlabel="share of a sample's tokens", ylabel="samples")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()


def draw_reasons(axes: Axes, result: Survey) -> None:
    axes.set(title="Rejected", xlabel="records")
    found = result.reasons.most_common(10)
    if rest := len(result.rejections) - sum(count for _, count in found):
        found.append(("other reasons", rest))
    found.reverse()
    if not found:
        axes.text(0.5, 0.5, "nothing", ha="center", va="center", color=QUIET, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    bars = axes.barh([reason for reason, _ in found], [count for _, count in found], color=VERMILION)
    axes.bar_label(bars, padding=3)
    axes.margins(x=0.12)
    whole_ticks(axes.xaxis)
