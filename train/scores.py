"""What answers are worth: exact match, by question type, and the tables that compare models."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

LABELS = {"full": "full tokens", "training_free": "training-free", "fine_tuned": "fine-tuned"}
ALL = "all"


@dataclass
class Scores:
    """Exact match of one model. `types`: type → (right, asked). `answers`: one dict a question, in the file's order."""

    types: dict[str, tuple[int, int]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    unread: int = 0

    @property
    def accuracy(self) -> float:
        right, asked = (sum(column) for column in zip(*self.types.values(), strict=True)) if self.types else (0, 0)
        return right / asked if asked else 0.0

    @property
    def questions(self) -> int:
        return sum(asked for _, asked in self.types.values())


def normalise(text: str) -> str:
    """Case, spaces and a final full stop do not count."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().casefold()


def table(results: dict[str, Scores], tokens: int, of_tokens: int) -> str:
    """One row a model, one column a question type, as Markdown."""
    names = [name for name in LABELS if name in results]
    types = sorted({kind for name in names for kind in results[name].types} - {ALL})
    head = ["model", "tokens", *types, "all"]
    rows = [
        [
            LABELS[name],
            str(of_tokens if name == "full" else tokens),
            *(percent(*results[name].types.get(kind, (0, 0))) for kind in types),
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


def percent(right: int, asked: int) -> str:
    return f"{100 * right / asked:.1f} %" if asked else ""


def won_back(results: dict[str, Scores]) -> str:
    """What compression cost, and how much of it fine-tuning won back, in words."""
    if not {"full", "training_free", "fine_tuned"} <= set(results):
        return ""
    full, free, tuned = (results[name].accuracy for name in ("full", "training_free", "fine_tuned"))
    lost, back = 100 * (full - free), 100 * (tuned - free)
    share = f": {back / lost:.0%} of it" if lost > 0 else ""
    return f"Compression cost {lost:.1f} points; fine-tuning the projector won {back:.1f} back{share}."
