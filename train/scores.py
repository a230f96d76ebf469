"""What the answers to all questions are worth: scores by question type, and the tables that compare models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from train.metrics import normalise_answer

LABELS = {"full": "full tokens", "training_free": "training-free", "fine_tuned": "fine-tuned"}
ALL = "all"


def runs_on(answer: str, expected: str) -> bool:
    """Whether the answer is the expected one and then goes on: "top left left" for "top left"."""
    return normalise_answer(answer).startswith(f"{normalise_answer(expected)} ")


@dataclass
class Scores:
    """The score of one model.

    Attributes:
        types: question type → (sum of what the answers are worth, questions).
        answers: one dict a question, in the file's order.
        unread: questions that could not be asked.
    """

    types: dict[str, tuple[float, int]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    unread: int = 0

    @property
    def accuracy(self) -> float:
        return sum(right for right, _ in self.types.values()) / self.questions if self.questions else 0.0

    @property
    def questions(self) -> int:
        return sum(asked for _, asked in self.types.values())

    @property
    def ran_on(self) -> int:
        """Answers that count as wrong because they did not stop after the right one."""
        return sum(bool(row.get("ran_on")) for row in self.answers)


def render_scores(results: dict[str, Scores], tokens: int, of_tokens: int) -> str:
    """One row a model, one column a question type, as Markdown."""
    names = [name for name in LABELS if name in results]
    types = sorted({kind for name in names for kind in results[name].types} - {ALL})
    head = ["model", "tokens", *types, "all"]
    rows = [
        [
            LABELS[name],
            str(of_tokens if name == "full" else tokens),
            *(format_percent(*results[name].types.get(kind, (0, 0))) for kind in types),
            f"{100 * results[name].accuracy:.1f} %",
        ]
        for name in names
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def accuracy_at_budgets(results: dict[str, Scores]) -> dict[str, float]:
    """Budget → accuracy, of what `eval.budgets` asked for."""
    return {name.partition("@")[2]: scores.accuracy for name, scores in results.items() if "@" in name}


def render_budgets(results: dict[str, Scores]) -> str:
    """One row per budget of `eval.budgets`, as Markdown; empty if there are none."""
    found = accuracy_at_budgets(results)
    if not found:
        return ""
    rows = [f"| {budget} | {100 * accuracy:.1f} % |" for budget, accuracy in found.items()]
    return "\n".join(["| budget | accuracy |", "|---|---:|", *rows])


def format_percent(right: float, asked: int) -> str:
    return f"{100 * right / asked:.1f} %" if asked else ""


def describe_ran_on(results: dict[str, Scores]) -> str:
    """How many answers were right but did not stop, in words; empty where there is none."""
    counted = [(LABELS[name], results[name]) for name in LABELS if name in results]
    if not any(scores.ran_on for _, scores in counted):
        return ""
    each = (f"{label} {format_percent(scores.ran_on, scores.questions)}" for label, scores in counted)
    return f"Right but ran on, counted as wrong: {', '.join(each)}."


def describe_scores(results: dict[str, Scores], tokens: int, of_tokens: int) -> str:
    """The table, and below it what it says."""
    said = [render_budgets(results), describe_recovery(results), describe_ran_on(results)]
    return "\n\n".join([render_scores(results, tokens, of_tokens), *filter(None, said)])


def describe_recovery(results: dict[str, Scores]) -> str:
    """What compression cost, and how much of it fine-tuning won back, in words."""
    if not {"full", "training_free", "fine_tuned"} <= set(results):
        return ""
    full, free, tuned = (results[name].accuracy for name in ("full", "training_free", "fine_tuned"))
    lost, back = 100 * (full - free), 100 * (tuned - free)
    share = f": {back / lost:.0%} of it" if lost > 0 else ""
    return f"Compression cost {lost:.1f} points; fine-tuning the projector won {back:.1f} back{share}."
