"""What a metric is. A new one is a file of this folder, and `eval.metric` in the config names it::

@METRICS.register("starts_right")
def starts_right(answer, expected):
    return normalise(answer).startswith(normalise(expected))
"""

from __future__ import annotations

import re
from collections.abc import Callable

from visionzip.registry import Registry

Metric = Callable[[str, str], float]
"""A model's answer and the expected one → what it is worth, from 0 to 1."""

METRICS: Registry[Metric] = Registry("metric", "train.metrics")


def normalise_answer(text: str) -> str:
    """Case, spaces and a final full stop do not count."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().casefold()
