"""The plots of `visionzip analyze`: the paper's figures 2 and 5 for any encoder, budgets, and agreement between layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from visionzip.analysis.style import (
    BLUE,
    GREEN,
    ORANGE,
    QUIET,
    SKY,
    VERMILION,
    legend_beside,
    log_of_two,
    new_figure,
    set_title,
    whole_ticks,
)  # fmt: skip


def all_of(facts: dict[str, Any], maps: list[np.ndarray]) -> Iterator[tuple[str, Any]]:
    """File name and figure of each plot. `facts` comes from `analyze.summarize`, `maps` has one ``(rows, columns)`` per layer."""
    yield "spread", draw_spread(facts)
    yield "budget", draw_budget(facts)
    yield "layers", draw_layers(facts)
    yield "agreement", draw_agreement(facts)
    if maps:
        yield "layer_maps", layer_maps(facts, maps)


def describe_measurement(facts: dict[str, Any], measured: str = "mean") -> str:
    """The line below a title: model, budget, and over how many images."""
    budget = f"{facts['zip']['dominant']} + {facts['zip']['contextual']}"
    return f"{facts['name'] or facts['model']}, budget {budget}, {measured} of {facts['images']} images"


def draw_spread(facts: dict[str, Any]) -> Any:
    """Histogram of the attention per patch (figure 2 of the paper, right)."""
    edges = np.array(facts["spread"]["edges"])
    share = 100 * np.array(facts["spread"]["share_of_patches"])
    used = np.flatnonzero(share > 0)
    edges, share = edges[used[0] : used[-1] + 2], share[used[0] : used[-1] + 1]
    figure, axes = new_figure(6.8, 4)
    centres = np.sqrt(edges[:-1] * edges[1:])
    bars = axes.bar(edges[:-1], share, width=np.diff(edges), align="edge", color=SKY, linewidth=0)
    for bar, centre in zip(bars, centres, strict=True):
        if centre >= 1:
            bar.set_color(VERMILION)
    above = share[centres >= 1].sum()
    log_of_two(axes)
    axes.set(xlabel="attention a patch has, in multiples of its image's average", ylabel="patches, %")
    set_title(figure, f"{above:.0f} % of the patches have more than the average attention", describe_measurement(facts))
    return figure


def draw_budget(facts: dict[str, Any]) -> Any:
    """Attention held against patches kept, with the budgets that hold 80, 90 and 95 %."""
    curve = 100 * np.array(facts["curve"])
    patches = facts["patches_per_tile"]
    figure, axes = new_figure(8.6, 4.2)
    axes.plot(
        np.linspace(0, patches, len(curve)), curve, color=BLUE, linewidth=2.4, label="most attended patches first"
    )
    axes.plot([0, patches], [0, 100], color=QUIET, linestyle="--", linewidth=1.2, label="if all patches were alike")
    for (level, found), marker in zip(facts["budget_for"].items(), "os^", strict=True):
        needed, held = found["patches"]["median"], float(level.rstrip("%"))  # the median, as in the table
        axes.plot([needed, needed, 0], [0, held, held], color=ORANGE, linewidth=1, alpha=0.6)
        axes.plot(needed, held, marker, color=ORANGE, markersize=8, label=f"{level}: {needed:.0f} patches")
    if facts["held_by_budget"]:
        kept, held = facts["kept_patches_per_tile"], 100 * facts["held_by_budget"]["median"]
        axes.plot(
            kept, held, "D", color=VERMILION, markersize=8, label=f"this budget: {kept:.0f} patches have {held:.0f}%"
        )
    legend_beside(figure, axes)
    axes.set(xlabel=f"patches kept, of {patches:.0f}", ylabel="attention held, %", ylim=(0, 103), xlim=(0, patches))
    whole_ticks(axes.xaxis)
    set_title(figure, "Attention held by a budget", describe_measurement(facts, "curve: mean, points: median"))
    return figure


def draw_layers(facts: dict[str, Any]) -> Any:
    """Concentration layer by layer (figure 5 of the paper in numbers); bands are quartiles over images."""
    numbers = [layer["layer"] for layer in facts["layers"]]
    figure, axes = new_figure(8.6, 4.2)
    series = (
        ("top_10_percent_hold", "attention held by the top 10 %", BLUE, "o-"),
        ("share_for_90%", "patches needed for 90 % of it", ORANGE, "s-"),
        ("effective_share", "effective number of patches", GREEN, "^-"),
    )
    for key, label, colour, line in series:
        values = {name: [100 * layer[key][name] for layer in facts["layers"]] for name in ("low", "median", "high")}
        axes.plot(numbers, values["median"], line, color=colour, label=label, linewidth=2, markersize=6)
        axes.fill_between(numbers, values["low"], values["high"], color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="layer", ylabel="% of the attention, or of the patches", ylim=(0, 103))
    whole_ticks(axes.xaxis)
    legend_beside(figure, axes)
    set_title(figure, "Concentration by layer", describe_measurement(facts, "median and quartiles"))
    return figure


def draw_agreement(facts: dict[str, Any]) -> Any:
    """The share of the patches kept by one layer that another layer would keep too."""
    matrix = 100 * np.array(facts["agreement"])
    count = len(matrix)
    figure, axes = new_figure(5.6, 4.8)
    chance = 100 * facts["kept_patches_per_tile"] / facts["patches_per_tile"]
    image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=100, origin="lower")
    ticks = range(count) if count <= 12 else range(3, count, 4)
    axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
    axes.set_yticks(ticks, [str(tick + 1) for tick in ticks])
    axes.grid(visible=False)
    if count <= 12:
        for row in range(count):
            for column in range(count):
                ink = "black" if matrix[row, column] > 50 else "white"
                axes.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", color=ink, fontsize=10)
    axes.set(xlabel="layer", ylabel="layer")
    set_title(figure, f"Patches that two layers both keep, % (by chance: {chance:.0f})", describe_measurement(facts))
    figure.colorbar(image, ax=axes, shrink=0.85).outline.set_visible(False)
    return figure


def layer_maps(facts: dict[str, Any], maps: list[np.ndarray]) -> Any:
    """The attention of every layer on one image (figure 5 of the paper), each on a separate square-root scale."""
    columns = min(len(maps), 6)
    rows = -(-len(maps) // columns)
    figure, axes = new_figure(1.9 * columns, 2.1 * rows + 0.4, nrows=rows, ncols=columns, squeeze=False)
    for place, one in enumerate(axes.flat):
        one.set_axis_off()
        if place < len(maps):
            one.imshow(np.sqrt(maps[place]), cmap="cividis")
            one.set_title(f"layer {place + 1}", fontsize=10, fontweight="normal")
    set_title(
        figure,
        "Where each layer attends, in one image (yellow: most)",
        f"{facts['name'] or facts['model']}, each layer on its own scale",
    )
    return figure
