"""What the cells of a sweep found: a table with mean and spread, the same as JSON, a plot of accuracy against tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from train.report_plots import standard_error
from visionzip.analysis.style import QUIET, SERIES, legend_beside, new_figure, save_figure, set_title, style

#: A finished cell: its axes, the key of its training-free result, its folder, its results.json.
Found = tuple[dict[str, str], str, Path, dict[str, Any]]


@dataclass
class Group:
    """All seeds of one place in the sweep. Accuracies are fractions; `spread` is the standard deviation over seeds."""

    axes: dict[str, str]
    tokens: int
    seeds: int
    training_free: float | None
    fine_tuned: float
    spread: float | None
    behind: float | None = None  # the best fine-tuned of this budget minus this one
    behind_error: float | None = None  # standard error of that, see `compare_groups`
    beats_scaled: bool | None = None  # better than `scaled` by two standard errors; None: that was not run
    costs: dict[str, float] | None = None  # `train.sweep_costs`
    right: Any = field(default=None, repr=False)  # (questions,) share of seeds that answered right
    images: Any = field(default=None, repr=False)  # (questions,) which image each is about

    @property
    def size(self) -> str:
        """What groups have in common that are compared with each other: the budget, as it was given."""
        return self.axes.get("budget", str(self.tokens))

    @property
    def label(self) -> str:
        return ", ".join(
            value if name == "selector" else f"{name.rsplit('.', 1)[-1]}={value}" for name, value in self.series
        )

    @property
    def series(self) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.axes.items() if name not in ("budget", "seed")]


def write_results(out: Path, cells: Sequence[Found]) -> str:
    """`sweep.json`, `sweep.md`, `sweep.png` in `out`; returns the table."""
    groups = group_cells(cells)
    full = next((results["full"] for *_, results in cells if "full" in results), None)
    of_tokens, questions = (next((results[key] for *_, results in cells), 0) for key in ("of_tokens", "questions"))
    text = render_markdown(groups, full, of_tokens, questions)
    facts = {
        "full": full,
        "of_tokens": of_tokens,
        "questions": questions,
        "groups": [{k: v for k, v in asdict(group).items() if k not in ("right", "images")} for group in groups],
        "cells": [{**axes, "folder": str(folder), **{k: v for k, v in found.items() if k != "by_type"}} for axes, _, folder, found in cells],
    }  # fmt: skip
    (out / "sweep.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "sweep.md").write_text(text + "\n")
    draw_sweep(out / "sweep.png", groups, full, of_tokens, questions, find_model_name(cells))
    return text


def find_model_name(cells: Sequence[Found]) -> str:
    """The name of the model that the cells trained, for a title; empty where no cell's config can be read."""
    import yaml

    try:
        config = yaml.safe_load((cells[0][2] / "config.yaml").read_text(encoding="utf-8"))
        return f"{Path(config['model']['path']).name}, "
    except (OSError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return ""


def group_cells(cells: Sequence[Found]) -> list[Group]:
    """Seeds together; by tokens, then best first."""
    free = {key: results["training_free"] for _, key, _, results in cells if "training_free" in results}
    together: dict[tuple[Any, ...], list[Found]] = {}
    for cell in cells:
        together.setdefault(tuple((k, v) for k, v in cell[0].items() if k != "seed"), []).append(cell)
    groups = []
    for axes, found in together.items():
        tuned = [results["fine_tuned"] for *_, results in found]
        right, images = read_answers([folder for _, _, folder, _ in found])
        costs = next((results["costs"] for *_, results in found if results.get("costs")), None)
        spread = float(np.std(tuned, ddof=1)) if len(tuned) > 1 else None
        groups.append(
            Group(dict(axes), found[0][3]["tokens"], len(found), free.get(found[0][1]), float(np.mean(tuned)), spread,
                  right=right, images=images, costs=costs)
        )  # fmt: skip
    groups.sort(key=lambda group: (group.tokens, -group.fine_tuned))
    for size in {group.size for group in groups}:
        same = sorted((group for group in groups if group.size == size), key=lambda group: -group.fine_tuned)
        for group in same[1:]:
            group.behind, group.behind_error = compare_groups(same[0], group)
        scaled = next((group for group in same if group.axes.get("selector") == "scaled"), None)
        for group in same:
            if scaled is not None and group is not scaled:
                ahead, error = compare_groups(group, scaled)
                group.beats_scaled = ahead > 2 * error
    return groups


def read_answers(folders: Iterable[Path]) -> tuple[Any, Any]:
    """(questions,) mean over the folders of whether the fine-tuned model was right, and the image each question is about."""
    right, names = [], []
    for folder in folders:
        lines = (folder / "report" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for line in lines if (row := json.loads(line))["model"] == "fine_tuned"]
        right.append([float(row["right"]) for row in rows])
        names = [row["id"].rsplit("/", 1)[0] for row in rows]
    return np.mean(right, axis=0), np.unique(names, return_inverse=True)[1]


def compare_groups(best: Group, other: Group) -> tuple[float, float]:
    """How much better `best` is, and the standard error of that.

    Both answered the same questions, so it is the paired difference of each image (its questions are not independent) that varies
    over images; what varies over seeds is added, which counts a part of it twice: the error is overestimated.
    """
    gap = best.right - other.right  # (questions,)
    by_image = np.bincount(best.images, weights=gap)
    images = len(by_image)
    over_images = by_image.var(ddof=1) * images / len(gap) ** 2 if images > 1 else 0.0
    over_seeds = sum((group.spread or 0.0) ** 2 / group.seeds for group in (best, other))
    return float(gap.mean()), math.sqrt(over_images + over_seeds)


def render_markdown(groups: Sequence[Group], full: float | None, of_tokens: int, questions: int) -> str:
    """Markdown: a row a group, best first at each budget; in bold what lies within two standard errors of the best."""
    names = list(dict.fromkeys(name for group in groups for name in group.axes if name != "budget"))
    counted = any(group.costs for group in groups)
    head = ["tokens", *names, "training-free", "fine-tuned", "seeds", "gain", "behind the best"]
    head += ["mean over layers", "GFLOP", "KV cache, kB"] if counted else []
    rows = []
    for group in groups:
        free, tuned, error = group.training_free, group.fine_tuned, group.behind_error
        mark = " †" if group.beats_scaled is False else ""
        shown = f"{100 * tuned:.1f}" + (f" ± {100 * group.spread:.1f}" if group.spread is not None else "")
        close = group.behind is None or (error is not None and group.behind <= 2 * error)
        rows.append(
            [
                str(group.tokens),
                *(group.axes.get(name, "") for name in names),
                f"{100 * free:.1f}" if free is not None else "",
                (f"**{shown}**" if close else shown) + mark,
                str(group.seeds),
                f"{100 * (tuned - free):+.1f}" if free is not None else "",
                f"{100 * group.behind:.1f} ± {100 * error:.1f}"
                if group.behind is not None and error is not None
                else "",
                *(render_costs(group.costs) if counted else ()),
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + " --- |" * len(head))
    about = [f"Exact match in % of {questions} held-out questions; ± is the standard deviation over seeds, and in \"behind the best\" "
             "the standard error of the difference to the best of the same budget. Bold: within two of these."]  # fmt: skip
    if any(group.beats_scaled is False for group in groups):
        about.append("†: not better than the image scaled down to the same budget (`scaled`) by two standard errors.")
    if counted:
        about.append("Counted for one prompt with one image: visual tokens averaged over the LLM's layers; operations of encoder, "
                     "projector and prefill; keys and values of the visual tokens.")  # fmt: skip
    if full is not None:
        about.insert(0, f"Full tokens ({of_tokens}): {100 * full:.1f} %.")
    if any(group.seeds == 1 for group in groups):
        about.append("Where there is one seed, what varies over seeds is not in these numbers.")
    about += [
        f"Rank agreement of training-free and fine-tuned (Kendall's τ) at {t} tokens: {tau:+.2f}."
        for t, tau in rank_agreement(groups)
    ]
    return "\n".join([*lines, "", *about])


def render_costs(costs: dict[str, float] | None) -> list[str]:
    if not costs:
        return ["", "", ""]
    return [f"{costs['visual_tokens_mean']:g}", f"{costs['flops'] / 1e9:.4g}", f"{costs['cache_bytes'] / 1e3:.4g}"]


def rank_agreement(groups: Sequence[Group]) -> list[tuple[int, float]]:
    """For each budget Kendall's τ-a of the two rankings, where at least three differ training-free."""
    found = []
    for tokens in sorted({group.tokens for group in groups}):
        same = [(g.training_free, g.fine_tuned) for g in groups if g.tokens == tokens and g.training_free is not None]
        pairs = [np.sign(a[0] - b[0]) * np.sign(a[1] - b[1]) for i, a in enumerate(same) for b in same[:i]]
        if len({free for free, _ in same}) > 2:
            found.append((tokens, float(np.mean(pairs))))
    return found


def draw_sweep(
    path: Path, groups: Sequence[Group], full: float | None, of_tokens: int, questions: int, about: str = ""
) -> Path:
    """Two panels on one scale, training-free and fine-tuned; one line a series, the same colour and marker in both.

    Lines at a point are the standard deviation over seeds where there are several, else the standard error over questions.
    """
    labels = list(dict.fromkeys(group.label for group in groups))
    with style():
        figure, panels = new_figure(10.4, 4.8, ncols=2, sharey=True)
        for axes, tuned in zip(panels, (False, True), strict=True):
            for number, label in enumerate(labels):
                colour, marker = SERIES[number % len(SERIES)]
                points = [g for g in groups if g.label == label and (tuned or g.training_free is not None)]
                points.sort(key=lambda group: group.tokens)
                values = [g.fine_tuned if tuned else g.training_free or 0.0 for g in points]
                spreads = [g.spread if tuned else None for g in points]
                errors = [
                    spread if spread is not None else standard_error(value * questions, questions)
                    for value, spread in zip(values, spreads, strict=True)
                ]
                axes.errorbar([g.tokens for g in points], [100 * v for v in values], yerr=[100 * e for e in errors], color=colour,
                              marker=marker, markersize=6, linewidth=1.6, label=label,
                              linestyle="-" if number < len(SERIES) else "--")  # fmt: skip
            if full is not None:
                axes.axhline(100 * full, color=QUIET, linestyle=":", linewidth=1.4, label=f"full: {of_tokens} tokens")
            ticks = sorted({group.tokens for group in groups})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set(xlabel="visual tokens per image", title="fine-tuned" if tuned else "training-free")
        panels[0].set_ylabel("exact match, %")
        legend_beside(figure, panels[1])
        seeds = max((group.seeds for group in groups), default=1)
        what = (
            f"± standard deviation over {seeds} seeds, training-free ± standard error"
            if seeds > 1
            else "± one standard error"
        )
        set_title(figure, "Accuracy against visual tokens", f"{about}{questions:,} questions, {what}")
        return save_figure(figure, path)


def log_summary(config: Any, out: Path) -> None:
    """Table and plot as a separate run in the cells' group on W&B. The files do not depend on W&B."""
    import logging

    from train.callbacks import choose_mode

    try:
        import wandb

        run = wandb.init(
            project=config.wandb.project, group=config.wandb.group, name=f"{out.name}-summary", job_type="sweep",
            mode=cast(Any, choose_mode(config)), dir=str(out), settings=wandb.Settings(init_timeout=30, silent=True, console="off"),
        )  # fmt: skip
        rows = json.loads((out / "sweep.json").read_text())["groups"]
        names = list(rows[0])
        cells = [[str(row[name]) if isinstance(row[name], dict) else row[name] for name in names] for row in rows]
        run.log({"sweep/plot": wandb.Image(str(out / "sweep.png")), "sweep/table": wandb.Table(names, cells)})
        run.finish()
    except Exception as error:
        logging.getLogger(__name__).warning("W&B: %s; %s has everything", error, out)
