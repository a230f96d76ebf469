"""One palette and one style for every drawing and plot: the library's, a run's report, and `visionzip data`.

The colours are Okabe and Ito's, which can be distinguished with red-green colour blindness; no meaning is conveyed by colour
alone. Figures are made without pyplot, so a server can make them in any thread.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, VERMILION, SKY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
QUIET = "#8c959f"
"""Lines that are there to compare with."""
SERIES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (PINK, "D"), (ORANGE, "v"), (SKY, "P"), (QUIET, "X"))
"""Colour and marker of each line of a plot: no two differ by colour alone."""
MODELS = {"full": BLUE, "training_free": ORANGE, "fine_tuned": GREEN}
"""Colour of all tokens, of compression alone, and of what was fine-tuned, in every plot that has them."""
_INK = "#010203"  # stands for the page's own text colour in an SVG


@dataclass(frozen=True)
class Theme:
    """Colours of background, text and secondary lines of a page or panel."""

    background: tuple[int, int, int]
    text: tuple[int, int, int]
    quiet: tuple[int, int, int]


THEMES = {
    "light": Theme((255, 255, 255), (28, 32, 38), (110, 118, 129)),
    "dark": Theme((22, 27, 34), (230, 237, 243), (145, 152, 161)),
}


def rgb(colour: str) -> tuple[int, int, int]:
    """``"#0072B2"`` → ``(0, 114, 178)``."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


@contextmanager
def style(theme: str = "light") -> Iterator[None]:
    """Colours and sizes for everything drawn inside the block. ``"page"``: transparent, in the colour of the page's text.

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
    background = "none" if page else _hex(look.background)
    with matplotlib.rc_context(
        {
            "figure.facecolor": background, "axes.facecolor": background, "savefig.facecolor": background,
            "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "axes.titlecolor": ink,
            "xtick.color": ink, "ytick.color": ink, "legend.labelcolor": ink, "legend.frameon": False, "legend.fontsize": 10,
            "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "axes.titleweight": "bold",
            "figure.titlesize": 12, "figure.titleweight": "bold", "errorbar.capsize": 3,
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


def set_title(figure: Any, title: str, about: str) -> None:
    """A title over the whole figure and, below it in normal weight, a subtitle: model, budget, number of images or questions."""
    above = figure.suptitle(f"{title}\n ", x=0.012, ha="left")  # the empty second line reserves room for the subtitle
    below = figure.axes[0].annotate(about, (0, 0), xycoords=above, fontsize=10, va="bottom", annotation_clip=False)
    below.set_in_layout(False)


def legend_beside(figure: Any, axes: Any, where: str = "outside right upper", **options: Any) -> None:
    """The legend of `axes`, placed beside the axes so that it never covers the plot."""
    figure.legend(*axes.get_legend_handles_labels(), loc=where, **options)


def whole_ticks(axis: Any) -> None:
    """Ticks at whole numbers only, for counts."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def log_of_two(axes: Any) -> None:
    """A logarithmic x axis with ticks at ¼×, ½×, 1×, 2× …"""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}×" if value >= 1 else f"1/{round(1 / value)}×")
    )


def save_figure(figure: Any, path: str | Path, dpi: int = 130) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return Path(path)


def svg(figure: Any) -> str:
    """A figure made with ``style("page")`` as an SVG element that takes the text colour of the page it is put in."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :].replace(_INK, "currentColor")
