"""`exact_match`: the answer is the expected one, but for case, spaces and a final full stop."""

from __future__ import annotations

from train.metrics.base import METRICS, normalise_answer


@METRICS.register("exact_match")
def exact_match(answer: str, expected: str) -> bool:
    return normalise_answer(answer) == normalise_answer(expected)
