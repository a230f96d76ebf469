"""`report/`: what a run did, to look at. Loss curve, accuracy bars and kept patches as PNG; table and results as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train import report_plots
from train.config import RunConfig
from train.held_out import image_inputs, load_questions, one_question_per_image
from train.scores import LABELS, Scores, accuracy_at_budgets, describe_scores
from visionzip import attached


def summarize_results(
    scores: dict[str, Scores], tokens: int, of_tokens: int, seed: int, trainable: int
) -> dict[str, Any]:
    """The content of `results.json`; accuracies are fractions, what was not measured is left out."""
    return {
        **{name: scores[name].accuracy for name in LABELS if name in scores},
        **({"budgets": at_budgets} if (at_budgets := accuracy_at_budgets(scores)) else {}),
        "tokens": tokens,
        "of_tokens": of_tokens,
        "ran_on": {name: found.ran_on / found.questions for name, found in scores.items() if found.questions},
        "questions": max((s.questions for s in scores.values()), default=0),
        "seed": seed,
        "trainable_parameters": trainable,
        "by_type": {
            name: {kind: right / asked for kind, (right, asked) in sorted(s.types.items())}
            for name, s in scores.items()
        },
    }


def write_report(
    folder: str | Path, config: RunConfig, scores: dict[str, Scores], facts: dict[str, Any], log: list[dict[str, Any]]
) -> list[Path]:
    """Everything that needs no model. `facts` is `summarize_results()`. Returns the figures."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = report_plots.describe_run(config, facts)
    images = []
    if any("loss" in line for line in log):
        images.append(report_plots.draw_loss(folder / "loss.png", log, about))
    if scores:
        (folder / "table.md").write_text(f"{describe_scores(scores, facts['tokens'], facts['of_tokens'])}\n")
        with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
            for name, result in scores.items():
                file.writelines(json.dumps({"model": name, **row}) + "\n" for row in result.answers)
        images.append(report_plots.draw_accuracy(folder / "accuracy.png", scores, facts, about))
    # Last: where it is, the rest is complete (train.sweep takes it for the end of a cell).
    (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    return images


def draw_kept_patches(
    folder: str | Path, model: Any, processor: Any, config: RunConfig, scores: dict[str, Scores]
) -> list[Path]:
    """A few held-out images: attention, kept patches, what was merged into which token, the question and the answers to it.

    One file per image; of a tiled one the last tile (`visionzip visualize` draws all of them).
    """
    from visionzip.analysis.trace import trace_inputs

    attachment = attached(model)
    if attachment is None or not config.report.images:
        return []
    given = {name: {row["id"]: str(row["answer"]) for row in found.answers} for name, found in scores.items()}
    paths: list[Path] = []
    for question in one_question_per_image(load_questions(config, processor), config.report.images):
        tile = trace_inputs(attachment, processor, image_inputs(question)).tiles[-1]
        answers = {name: rows[question.id] for name, rows in given.items() if question.id in rows}
        paths.append(report_plots.draw_kept(Path(folder) / f"kept_{len(paths)}.png", tile, question, answers))
    return paths
