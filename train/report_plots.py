"""The figures of a run's `report/`, in the library's style: loss, accuracy with standard errors, kept patches with answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.config import RunConfig
from train.scores import ALL, LABELS, Scores
from visionzip.analysis.style import (
    BLUE,
    MODELS,
    QUIET,
    legend_beside,
    new_figure,
    save_figure,
    set_title,
    style,
    whole_ticks,
)
from visionzip.budgets import format_budget


def describe_run(config: RunConfig, facts: dict[str, Any]) -> str:
    """The line below a title: model, tokens and budget."""
    name = Path(config.model.path).name
    return f"{name}, {facts['tokens']} of {facts['of_tokens']} visual tokens ({format_budget(config.zip)}, {config.zip.selector})"


def draw_loss(path: Path, log: Sequence[dict[str, Any]], about: str) -> Path:
    """Every logged loss, and a running mean where there are many. `log`: lines with `step` and `loss` among others."""
    steps, losses = np.array([(line["step"], line["loss"]) for line in log if "loss" in line]).T
    window = max(1, len(losses) // 25)
    with style():
        figure, axes = new_figure(7.2, 4.2)
        axes.plot(steps, losses, color=QUIET, linewidth=0.8, label="each log line")
        if window > 1:
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], smooth, color=BLUE, linewidth=2, label=f"mean of {window} log lines")
            axes.legend()
        axes.set(xlabel="optimizer step", ylabel="loss, nats per supervised token")
        whole_ticks(axes.xaxis)
        set_title(figure, "Training loss", about)
        return save_figure(figure, path)


def standard_error(right: float, asked: int) -> float:
    """Of a share of right answers, as if each question were drawn by itself; 0 where there is none."""
    share = right / asked if asked else 0.0
    return math.sqrt(max(0.0, share * (1 - share)) / asked) if asked else 0.0


def draw_accuracy(path: Path, scores: dict[str, Scores], facts: dict[str, Any], about: str) -> Path:
    """A bar for each model, in all and by type of question where there are several; lines are one standard error."""
    names = [name for name in LABELS if name in scores]
    types = sorted({kind for name in names for kind in scores[name].types} - {ALL})
    kinds = [*types, ALL] if len(types) > 1 else [ALL]
    width = 0.8 / len(names)
    with style():
        figure, axes = new_figure(max(6.4, 1.3 * len(kinds) + 3.0), 4.4)
        for place, name in enumerate(names):
            found = [count_right(scores[name], kind) for kind in kinds]
            values = [100 * right / asked if asked else 0.0 for right, asked in found]
            errors = [100 * standard_error(*one) for one in found]
            tokens = facts["of_tokens"] if name == "full" else facts["tokens"]
            where = np.arange(len(kinds)) + (place - (len(names) - 1) / 2) * width
            axes.bar(where, values, 0.94 * width, yerr=errors, color=MODELS[name], label=f"{LABELS[name].removesuffix(' tokens')}: {tokens} tokens",
                     error_kw={"elinewidth": 1.2, "ecolor": axes.xaxis.label.get_color()})  # fmt: skip
            for x, value, error in zip(where, values, errors, strict=True):
                axes.annotate(
                    f"{value:.0f}", (x, value + error), (0, 3), textcoords="offset points", ha="center", fontsize=9
                )
        axes.set_xticks(range(len(kinds)), ["all questions" if kind == ALL else kind for kind in kinds])
        axes.grid(visible=False, axis="x")
        axes.set(ylabel="exact match, %", ylim=(0, 112), yticks=range(0, 101, 20), xlim=(-0.6, len(kinds) - 0.4))
        legend_beside(figure, axes, "outside lower center", ncols=len(names))
        set_title(figure, "Held-out questions", f"{about}; {facts['questions']:,} questions, ± one standard error")
        return save_figure(figure, path)


def count_right(scores: Scores, kind: str) -> tuple[float, int]:
    """Right answers and questions of one type, or of `ALL`."""
    if kind == ALL:
        return scores.accuracy * scores.questions, scores.questions
    return scores.types.get(kind, (0.0, 0))


def draw_kept(path: Path, tile: Any, question: Any, answers: dict[str, str]) -> Path:
    """What is kept of an image (`visionzip.analysis.trace.Tile`), with what was asked of it and what each model answered.

    Args:
        answers: model → its answer, of those that were measured.
    """
    from visionzip.analysis import draw
    from visionzip.analysis.visualize import describe_tile, draw_views

    said = " · ".join(f"{LABELS[name]}: {answers[name] or '(nothing)'}" for name in LABELS if name in answers)
    lines = [f"expected: {question.answer}" + (f" · {said}" if said else ""), describe_tile(tile), question.id]
    draw.draw_panel(draw_views(tile, 320), question.question, "\n".join(lines)).save(path)
    return path
