"""What each budget is worth and what it costs, on somebody's own questions: the curve that `visionzip budget` shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from data.config import EvalSection
from data.questions import Question, Questions
from train.held_out import image_inputs, one_question_per_image, score_questions
from visionzip import attached, set_budget
from visionzip.attach import paused
from visionzip.benchmark import time_turns
from visionzip.budgets import ALL, ladder
from visionzip.inputs import batch_prompts, to_model

FEW = 8
"""Budgets that are asked where nobody names any, all tokens not counted."""


@dataclass(frozen=True)
class Point:
    """One budget. Times in seconds, sizes in bytes.

    Attributes:
        budget: as it was asked for (``"32"``), or ``"all"``.
        tokens: visual tokens per image.
        accuracy: mean of what the answers are worth, and its standard error `error` (binomial).
        prefill: median time of the LLM on the prompt of one question, batch 1.
        first: … to the first token, the encoder included.
        cache: keys and values of that prompt and one token of an answer.
        knee: more tokens than these buy the least for what they cost.
    """

    budget: str
    tokens: int
    accuracy: float
    error: float
    prefill: float
    first: float
    cache: int
    knee: bool = False


def default_budgets(model: Any, stock: int) -> list[str]:
    """The trained budgets where there are up to `FEW`, else `FEW` of their range in equal ratios, and all tokens.

    Args:
        stock: visual tokens of an image in the untouched model.
    """
    attachment = attached(model)
    assert attachment is not None
    rungs = ladder(attachment.trained or attachment.config)
    if 1 < len(rungs) <= FEW:
        return [*(f"{dominant}+{contextual}" for dominant, contextual in rungs), ALL]
    if len(rungs) > 1:
        least, most = sum(rungs[0]), sum(rungs[-1])
    else:
        own = sum(attachment.config.resolve(stock, cap=True))
        least, most = max(2, own // 4), min(4 * own, stock // 2)
    steps = [least * (most / least) ** (place / (FEW - 1)) for place in range(FEW)] if most > least else [most]
    return [*map(str, sorted({round(step) for step in steps})), ALL]


def measure_budgets(
    model: Any,
    processor: Any,
    questions: Questions,
    section: EvalSection,
    budgets: Sequence[str],
    *,
    repeats: int = 3,
    report: Callable[[str], None] = lambda doing: None,
) -> list[Point]:
    """Every budget on all questions, ascending in tokens; the current budget is restored afterwards.

    Raises:
        ValueError: for a budget that can't be met (before anything is asked), or questions none of which has an image.
    """
    attachment = attached(model)
    assert attachment is not None
    own, found = attachment.config, []
    try:
        for budget in budgets:
            set_budget(model, budget)
        for number, budget in enumerate(budgets, start=1):
            report(f"budget {budget} ({number} of {len(budgets)})")
            set_budget(model, budget)
            found.append(measure_budget(model, processor, questions, section, budget, repeats))
    finally:
        if attached(model) is not None or paused(model) is not None:
            set_budget(model, own)
    return mark_knee(sorted(found, key=lambda point: point.tokens))


def measure_budget(
    model: Any, processor: Any, questions: Questions, section: EvalSection, budget: str, repeats: int
) -> Point:
    """The current budget on all questions."""
    example = next(iter(one_question_per_image(questions, 1)), None)
    if example is None:
        raise ValueError("no question has an image, so a budget of visual tokens changes nothing")
    scores = score_questions(model, processor, questions, section)
    mean = scores.accuracy
    times = [time_example(model, processor, example) for _ in range(repeats + 1)][1:]  # the first warms up
    return Point(
        budget,
        count_tokens(model, example),
        mean,
        math.sqrt(mean * (1 - mean) / scores.questions),
        statistics.median(one["prefill"] for one in times),
        statistics.median(one["first"] for one in times),
        times[0]["cache"],
    )


def time_example(model: Any, processor: Any, example: Question) -> dict[str, Any]:
    inputs = to_model(model, batch_prompts(processor, [example.inputs]))
    (found,) = time_turns(model, processor, inputs, 1, 2)
    return found


def count_tokens(model: Any, example: Question) -> int:
    """Visual tokens of the first image of a question, in the prompt; all tiles of it together."""
    attachment = attached(model) or paused(model)
    assert attachment is not None
    counts = attachment.family.token_counts(attachment.config, **image_inputs(example))
    place = 0 if attached(model) is None else 1
    return sum(each[place] for each in counts) if attachment.family.by_tile else counts[0][place]


def mark_knee(points: Sequence[Point]) -> list[Point]:
    """The points with the knee of their curve marked: the one farthest above the straight line from the cheapest to the dearest.

    Tokens and accuracy are scaled to 0 … 1, and accuracy counts as the best that so many tokens gave or fewer, so that noise makes
    no second knee (Satopää et al. 2011, "Finding a Kneedle in a Haystack"). Where no budget is better than the cheapest by more
    than its standard error, the cheapest is the knee.
    """
    if not points:
        return []
    best = [max(point.accuracy for point in points[: place + 1]) for place in range(len(points))]
    gain, width = best[-1] - best[0], points[-1].tokens - points[0].tokens
    knee = 0
    if width and gain > points[0].error:
        above = [
            (top - best[0]) / gain - (point.tokens - points[0].tokens) / width
            for top, point in zip(best, points, strict=True)
        ]
        knee = above.index(max(above))
    return [replace(point, knee=place == knee) for place, point in enumerate(points)]


def render_points(points: Sequence[Point]) -> str:
    """Markdown: one line per budget, and a sentence about the knee below."""
    lines = [
        "| budget | visual tokens | accuracy | prefill ms | first token ms | KV cache MB | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for point in points:
        accuracy = f"{100 * point.accuracy:.1f} ± {100 * point.error:.1f} %"
        cells = [point.budget, str(point.tokens), accuracy, f"{1000 * point.prefill:.1f}", f"{1000 * point.first:.1f}"]
        cells += [f"{point.cache / 1e6:.2f}", "knee" if point.knee else ""]
        lines.append("| " + " | ".join(cells) + " |")
    knee, last = next(point for point in points if point.knee), points[-1]
    said = (
        f"Knee: {knee.tokens} tokens per image, {100 * knee.accuracy:.1f} %; {last.tokens} give {100 * (last.accuracy - knee.accuracy):+.1f} "
        f"points for {last.prefill / knee.prefill:.1f} times the prefill and {last.cache / knee.cache:.1f} times the cache."
    )
    return "\n".join([*lines, "", said])


def facts(points: Sequence[Point], **more: Any) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {**more, "points": [asdict(point) for point in points]}


def draw_points(points: Sequence[Point], about: str) -> Any:
    """Accuracy, prefill and cache against visual tokens, the knee ringed."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    from visionzip.analysis.style import BLUE, VERMILION, new_figure, set_title

    figure, axes = new_figure(11.5, 4, ncols=3)
    tokens = [point.tokens for point in points]
    knee = next(point for point in points if point.knee)
    panels = (
        ("Accuracy", "%", lambda point: 100 * point.accuracy),
        ("Prefill of one prompt", "ms", lambda point: 1000 * point.prefill),
        ("Keys and values of one prompt", "MB", lambda point: point.cache / 1e6),
    )
    for panel, (title, unit, value) in zip(axes, panels, strict=True):
        panel.plot(tokens, [value(point) for point in points], "o-", color=BLUE, linewidth=2)
        panel.plot(knee.tokens, value(knee), "o", markersize=15, markerfacecolor="none", markeredgecolor=VERMILION, markeredgewidth=2,
                   label=f"knee: {knee.tokens} tokens", linestyle="none")  # fmt: skip
        panel.set(title=title, ylabel=unit, xlabel="visual tokens per image")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(spaced(tokens)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(ScalarFormatter())
    axes[0].errorbar(tokens, [100 * point.accuracy for point in points], [100 * point.error for point in points], fmt="none",
                     ecolor=BLUE, alpha=0.5)  # fmt: skip
    for panel in axes[1:]:
        panel.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", fontsize=10)
    set_title(figure, "What a budget is worth, and what it costs", about)
    return figure


def spaced(tokens: Sequence[int]) -> list[int]:
    """Ticks at the points, those left out whose labels would touch on a logarithmic axis."""
    ticks: list[int] = []
    for count in tokens:
        if not ticks or math.log2(count / ticks[-1]) > 0.06 * math.log2(max(tokens) / min(tokens)) + 0.15:
            ticks.append(count)
    return ticks
