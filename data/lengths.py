"""How long a record will be, without reading its images or running the tokenizer: good enough to sort by."""

from __future__ import annotations

from typing import Any

from data.sample import NO_SAMPLE_INDEX, Rejection

CHARACTERS = 4.2
"""Of English conversation a token, with the vocabularies of Llama and Qwen. Only its size relative to an image's tokens matters."""

ROUND = 6
"""Tokens of a turn's frame."""


class Lengths:
    """`lengths[index]`: about how many tokens the item will have; 0 for padding and for what can't be read."""

    def __init__(self, dataset: Any, tokens_per_image: int) -> None:
        self.dataset, self.tokens = dataset, tokens_per_image

    def __getitem__(self, index: int) -> int:
        if index == NO_SAMPLE_INDEX:
            return 0
        sample = self.dataset.sample(index)
        if isinstance(sample, Rejection):
            return 0
        characters = sum(len(message.text) for message in sample.messages)
        about = int(characters / CHARACTERS) + ROUND * len(sample.messages) + self.tokens * len(sample.media)
        return min(about, self.dataset.config.max_length)
