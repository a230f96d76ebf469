"""lmms-eval's result files as the paper's table: scores, shares of the uncompressed score, and the published rows beside them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One column.

    Attributes:
        tasks: names lmms-eval has for it; the first one that was run counts.
        metrics: its results that are added up to the score (MME's is perception + cognition).
        scale: lmms-eval's number → the paper's (fractions → per cent).
        published: LLaVA-1.5-7B's scores in the order of `ROWS`, from arXiv 2412.04467, tables 1 and 2; empty where the paper has none.
    """

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    scale: float = 100.0
    published: tuple[float, ...] = ()


#: the published rows: tokens, fine-tuned
ROWS = ((576, False), (192, False), (192, True), (128, False), (128, True), (64, False), (64, True))
FULL = 576

BENCHMARKS = [
    Benchmark("GQA", ("gqa",), ("exact_match",), published=(61.9, 59.3, 60.1, 57.6, 58.9, 55.1, 57.0)),
    Benchmark(
        "MMB",
        ("mmbench_en_dev", "mmbench_en_test"),
        ("gpt_eval_score",),
        published=(64.7, 63.0, 63.4, 62.0, 62.6, 60.1, 61.5),
        scale=1.0,
    ),
    Benchmark(
        "MME",
        ("mme",),
        ("mme_perception_score", "mme_cognition_score"),
        published=(1862, 1782.6, 1834, 1761.7, 1823, 1690, 1756),
        scale=1.0,
    ),
    Benchmark("POPE", ("pope", "pope_full"), ("pope_f1_score",), published=(85.9, 85.3, 84.9, 83.2, 83.7, 77.0, 80.9)),
    Benchmark("SQA", ("scienceqa_img",), ("exact_match",), published=(69.5, 68.9, 68.2, 68.9, 68.3, 69.0, 68.8)),
    Benchmark(
        "VQAv2",
        ("vqav2_test", "vqav2_val", "vqav2_val_lite"),
        ("exact_match",),
        published=(78.5, 76.8, 77.4, 75.6, 76.6, 72.4, 74.2),
    ),
    Benchmark("TextVQA", ("textvqa_val",), ("exact_match",), published=(58.2, 57.3, 57.8, 56.8, 57.0, 55.5, 56.0)),
    Benchmark("MMMU", ("mmmu_val",), ("mmmu_acc",), published=(36.3, 36.6, 36.2, 37.9, 37.3, 36.2, 35.6)),
    Benchmark("SEED", ("seedbench",), ("seed_all",), published=(58.6, 56.4, 57.1, 54.9, 55.8, 52.2, 53.4)),
    Benchmark(
        "MMVet", ("mmvet",), ("gpt_eval_score",), published=(31.1, 31.7, 32.6, 32.6, 32.9, 31.7, 30.2), scale=1.0
    ),
    Benchmark(
        "LLaVA-B",
        ("llava_in_the_wild",),
        ("gpt_eval_llava_all",),
        published=(66.8, 67.7, 66.7, 64.8, 64.8, 62.9, 63.6),
        scale=1.0,
    ),
]


@dataclass
class Row:
    """One model: its scores by column, and what they are shares of."""

    label: str
    scores: dict[str, float]
    shares: dict[str, float] = field(default_factory=dict)
    published: bool = False

    @property
    def average(self) -> float | None:
        """Mean share of the columns there are, as the paper's last column; None where there is none."""
        return sum(self.shares.values()) / len(self.shares) if self.shares else None


def read_published() -> dict[tuple[int, bool], dict[str, float]]:
    """The paper's scores: (tokens, fine-tuned) → score by column."""
    known = [benchmark for benchmark in BENCHMARKS if benchmark.published]
    return {row: {benchmark.name: benchmark.published[i] for benchmark in known} for i, row in enumerate(ROWS)}


def read_scores(place: str | os.PathLike[str]) -> tuple[dict[str, float], bool]:
    """Scores by column from a result file, or from all of them below a directory, and whether all tokens were used.

    Where a task was run more than once, the newest file counts. A task that is not in the paper is a column of its own,
    under lmms-eval's name for it, with its first metric in per cent.

    Raises:
        ValueError: when there is none, or a file is not lmms-eval's.
    """
    path = Path(place)
    files = [path] if path.is_file() else sorted(path.rglob("*results.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError(f"there is no result file of lmms-eval in {place} (*results.json; run it with --output_path)")
    tasks: dict[str, dict[str, Any]] = {}
    full = False
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            tasks |= {task: dict(measured) for task, measured in content["results"].items()}
            full = "full=true" in str(content.get("config", {}).get("model_args", "")).lower()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a result file of lmms-eval ({type(error).__name__}: {error})") from error
    scores: dict[str, float] = {}
    for benchmark in BENCHMARKS:
        run = next((name for name in benchmark.tasks if name in tasks), None)
        if run is not None:
            scores[benchmark.name] = benchmark.scale * sum(_metric(tasks[run], name, run) for name in benchmark.metrics)
    known = {name for benchmark in BENCHMARKS for name in benchmark.tasks}
    for task, results in tasks.items():
        first = next(
            (key for key, value in results.items() if key.endswith(",none") and isinstance(value, float)), None
        )
        if task not in known and first is not None and "_stderr" not in first:
            scores[task] = 100 * results[first]
    if not scores:
        raise ValueError(f"{place} contains no score: its results are of {', '.join(tasks) or 'no task'}")
    return scores, full


def _metric(results: dict[str, Any], name: str, task: str) -> float:
    for key, value in results.items():
        if key.split(",")[0] == name and isinstance(value, int | float):
            return float(value)
    raise ValueError(f"{task} has no {name} among its results ({', '.join(sorted(results))})")


def build_rows(runs: dict[str, str], full: str | None = None, budget: int | None = None) -> tuple[list[Row], str]:
    """The rows of the table, and what the shares are of.

    Args:
        runs: label → result file or directory.
        full: label of the run with all tokens; default: the one that says so, else the published uncompressed scores.
        budget: published rows of this budget only.

    Raises:
        ValueError: for unreadable results, or a label that is none of `runs`.
    """
    rows, complete = [], []
    for label, place in runs.items():
        scores, all_tokens = read_scores(place)
        rows.append(Row(label, scores))
        complete += [label] if all_tokens else []
    if full is not None and full not in runs:
        raise ValueError(f"--full {full}: expected one of {', '.join(runs)}")
    named = full or (complete[0] if complete else None)
    published = read_published()
    vanilla = published[FULL, False]
    reference = next((row.scores for row in rows if row.label == named), vanilla)
    of = (
        f"{named}, measured here"
        if named
        else "the published uncompressed LLaVA-1.5-7B: measure your own with full=true"
    )
    for row in rows:
        row.shares = {name: score / reference[name] for name, score in row.scores.items() if reference.get(name)}
    measured = {name for row in rows for name in row.scores}
    # over the columns that were measured, so that the averages say the same thing
    shared = [name for name in vanilla if name in measured]
    for (tokens, tuned), scores in published.items():
        if shared and (budget is None or tokens in (budget, FULL)):
            shares = {name: scores[name] / vanilla[name] for name in shared}
            rows.append(Row(f"published, {tokens} tokens{' ‡' if tuned else ''}", scores, shares, published=True))
    return rows, of


def columns(rows: list[Row]) -> list[str]:
    """Those of `BENCHMARKS`, in its order, as far as anything was measured; then the others."""
    measured = {name for row in rows if not row.published for name in row.scores}
    names = [benchmark.name for benchmark in BENCHMARKS]
    return [name for name in names if name in measured] + sorted(measured - set(names))


def render_markdown(rows: list[Row], of: str) -> str:
    """The table: a score and, below it in the same cell, its share; the average share last."""
    shown = columns(rows)
    lines = [f"| | {' | '.join(shown)} | average share |", "|---" * (len(shown) + 2) + "|"]
    for row in rows:
        cells = [_cell(row, name) for name in shown]
        average = f"**{100 * row.average:.1f} %**" if row.average is not None else "–"
        lines.append(f"| {row.label} | {' | '.join(cells)} | {average} |")
    lines += [
        "",
        f"Shares of {of}. ‡ fine-tuned projector; published: arXiv 2412.04467, LLaVA-1.5-7B, shares of its own 576-token row.",
    ]
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    if name not in row.scores:
        return "–"
    score = f"{row.scores[name]:.0f}" if name == "MME" else f"{row.scores[name]:.1f}"
    return f"{score} ({100 * row.shares[name]:.1f} %)" if name in row.shares else score
