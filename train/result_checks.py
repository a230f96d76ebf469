"""Signs that a run went wrong, as warnings: a loss that does not fall, answers that are all wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.scores import Scores

FEWEST = 12
"""Log lines below which the loss is not judged."""

SHOWN = 3
"""Wrong answers in a warning."""


def check_loss(log: list[dict[str, Any]]) -> str:
    """A warning where the last quarter of the logged losses is not below the first by two standard errors; else empty."""
    losses = np.array([line["loss"] for line in log if "loss" in line])
    if len(losses) < FEWEST:
        return ""
    first, last = losses[: len(losses) // 4], losses[-(len(losses) // 4) :]
    error = np.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last))
    if first.mean() - last.mean() > 2 * error:
        return ""
    return (
        f"warning: the loss did not fall: {first.mean():.4g} on average in the first quarter of the run, {last.mean():.4g} in the last. "
        "Try another trainer.learning_rate or more steps, and look at the data (python -m data.inspect)"
    )


def check_answers(what: str, scores: Scores) -> str:
    """A warning where not one answer is right, with a few of them; else empty."""
    if not scores.answers or any(row["right"] for row in scores.answers):
        return ""
    rows = [
        f"  {row['question'].strip()[-80:]!r}: expected {row['expected'][:80]!r}, answered {row['answer'][:80]!r}"
        for row in scores.answers[:SHOWN]
    ]
    return "\n".join([f"warning: every answer is wrong ({what}). The first ones:", *rows])
