"""Plots, with matplotlib: light or dark, every axis with its unit, colours of Okabe and Ito's palette.

Figures are made without pyplot, so a server may make them in any thread.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from visionzip.analysis import redundancy
from visionzip.analysis.draw import THEMES
from visionzip.analysis.trace import Tile

BLUE, ORANGE, GREEN, VERMILION, SKY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
_INK = "#010203"  # stands for the page's own text colour in an SVG


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


@contextmanager
def style(theme: str = "light") -> Iterator[None]:
    """Colours and sizes for everything drawn inside. ``"page"``: transparent, in the colour of the page's text.

    Raises:
        ValueError: where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'visionzip-ft[viz]'") from error
    page = theme == "page"
    look = THEMES["light" if page else theme]
    ink = _INK if page else _hex(look.text)
    with matplotlib.rc_context(
        {
            "figure.facecolor": "none" if page else _hex(look.background),
            "axes.facecolor": "none" if page else _hex(look.background),
            "savefig.facecolor": "none" if page else _hex(look.background),
            "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "axes.titlecolor": ink,
            "xtick.color": ink, "ytick.color": ink, "legend.labelcolor": ink, "legend.frameon": False,
            "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "axes.titleweight": "bold",
            "font.size": 11, "axes.grid": True, "grid.alpha": 0.18, "grid.color": ink, "axes.axisbelow": True,
            "axes.titlelocation": "left", "svg.fonttype": "none", "figure.constrained_layout.use": True,
            "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
            "svg.hashsalt": "visionzip",
        }
    ):  # fmt: skip
        yield


def new_figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """A figure of `width` × `height` inches and its axes, outside of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**grid)


def save(figure: Any, path: str | Path, dpi: int = 130) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return Path(path)


def svg(figure: Any) -> str:
    """A figure made with ``style("page")`` as an SVG element that takes the text colour of the page it is put in."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def histogram(tiles: Sequence[Tile], what: str = "picture") -> Any:
    """How the attention is spread over the patches, and what of it the kept ones hold. Tiles or frames are taken together.

    Raises:
        ValueError: where there are no scores.
    """
    shares = [(tile.attention * tile.patches).flatten().numpy() for tile in tiles if tile.attention is not None]
    if len(shares) < len(tiles):
        raise ValueError("this model gave no attention scores, so there is no histogram of them")
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
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=10)
    return figure


def budget_curve(tile: Tile) -> Any:
    """How much of the attention the best 0, 1, 2 … patches of a tile hold, and where its budget stands.

    Raises:
        ValueError: where there are no scores.
    """
    if tile.attention is None or tile.held is None:
        raise ValueError("this model gave no attention scores, so there is no curve of them")
    held = 100 * redundancy.cumulative(tile.attention.flatten()).numpy()
    keep = int(tile.kept_mask.sum())
    figure, axes = new_figure(6.4, 3.7)
    axes.plot(np.arange(len(held)), held, color=BLUE, linewidth=2.2, label="most attended patches first")
    axes.plot([0, len(held) - 1], [0, 100], color=SKY, linewidth=1.2, linestyle="--", label="were all patches alike")
    axes.plot(keep, 100 * tile.held, "o", color=VERMILION, markersize=9, label=f"kept: {keep} patches, {tile.held:.0%}")
    axes.set(xlabel="patches kept", ylabel="attention held, %", xlim=(0, len(held) - 1), ylim=(0, 102))
    axes.legend(loc="lower right", fontsize=10)
    return figure


def log_of_two(axes: Any) -> None:
    """A logarithmic x axis with ticks at ¼×, ½×, 1×, 2× …"""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}×" if value >= 1 else f"1/{round(1 / value)}×")
    )
