"""How long a record will be, without reading its images or running the tokenizer: good enough to sort by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.elastic import Budget, Drawn
from data.sample import NO_SAMPLE_INDEX, Rejection

CHARACTERS = 4.2
"""Of English conversation a token, with the vocabularies of Llama and Qwen. Only its size relative to an image's tokens matters."""

ROUND = 6
"""Tokens of a turn's frame."""


class Lengths:
    """`lengths[index]`: about how many tokens the item will have; 0 for padding and for what can't be read.

    Args:
        at: of a `Drawn` index, visual tokens of an image at each budget; the item is then as long as all its rows.
    """

    def __init__(self, dataset: Any, tokens_per_image: int, at: Mapping[Budget, int] | None = None) -> None:
        self.dataset, self.tokens, self.at = dataset, tokens_per_image, at or {}

    def __getitem__(self, index: int | Drawn) -> int:
        if index == NO_SAMPLE_INDEX:
            return 0
        drawn = index if isinstance(index, Drawn) else None
        sample = self.dataset.sample(index if drawn is None else drawn.index)
        if isinstance(sample, Rejection):
            return 0
        characters = sum(len(message.text) for message in sample.messages)
        text = int(characters / CHARACTERS) + ROUND * len(sample.messages)
        tokens = [self.tokens] if drawn is None else [self.at[budget] for budget in drawn.budgets]
        tokens = tokens if sample.media else [0]  # there is then one row, whatever was drawn
        limit = self.dataset.config.max_length
        return sum(min(text + each * len(sample.media), limit) for each in tokens)
