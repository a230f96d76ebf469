"""A survey as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from data.inspect.survey import Survey

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's colours, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def plot(result: Survey, longest: int, path: Path) -> None:
    figure, ((length, images), (share, rejected)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(
        f"{result.read:,} records: {len(result.facts):,} used, {len(result.rejections):,} rejected, {len(result.cut):,} cut",
        fontsize=13,
    )
    lengths(length, result, longest)
    images_per_sample(images, result)
    supervised(share, result)
    reasons(rejected, result)
    for axes in (length, images, share, rejected):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def lengths(axes: Axes, result: Survey, longest: int) -> None:
    bins: Any = np.linspace(0, max(int(result.column("total").max(initial=1)), 1), 41)
    for name, colour, label in (("total", BLUE, "total"), ("text", ORANGE, "text"), ("image", GREEN, "images")):
        axes.hist(result.column(name), bins=bins, color=colour, histtype="step", linewidth=1.8, label=label)
    if bins[-1] > 0.8 * longest:
        axes.axvline(longest, color="0.4", linestyle=":", label=f"max_length {longest:,}")
    axes.set(title="Length", xlabel="tokens per sample", ylabel="samples")
    axes.legend(frameon=False)


def images_per_sample(axes: Axes, result: Survey) -> None:
    values, counts = np.unique(result.column("images"), return_counts=True)
    axes.bar(values, counts, color=GREEN, width=0.8)
    axes.set(title="Images", xlabel="images per sample", ylabel="samples")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(values) and values.max() < 3:
        axes.set_xlim(-0.75, 3.75)


def supervised(axes: Axes, result: Survey) -> None:
    total = result.column("total")
    axes.hist(result.column("supervised") / np.maximum(total, 1), bins=np.linspace(0, 1, 41).tolist(), color=BLUE)
    axes.axvline(
        result.supervised_share(), color=RED, linestyle="--", label=f"{result.supervised_share():.1%} of all tokens"
    )
    axes.set(title="Supervised", xlabel="share of a sample's tokens", ylabel="samples")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False)


def reasons(axes: Axes, result: Survey) -> None:
    axes.set(title="Rejected", xlabel="records")
    found = result.reasons.most_common(10)
    if rest := len(result.rejections) - sum(count for _, count in found):
        found.append(("other reasons", rest))
    found.reverse()
    if not found:
        axes.text(0.5, 0.5, "nothing", ha="center", va="center", color="0.4", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    bars = axes.barh([reason for reason, _ in found], [count for _, count in found], color=RED)
    axes.bar_label(bars, padding=3)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
