"""Conversation → token ids and loss mask: what `visionzip.prompts` renders, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.sample import Message, rejecting
from visionzip.prompts import BaseTemplate, Span
from visionzip.prompts import get_template as get_renderer

IGNORE = -100
"""Label of a token that is not supervised (torch's and transformers' own ignore index)."""


@dataclass(slots=True)
class Encoded:
    """`input_ids` and `labels` (L,), `images`: the half-open token range of each image or video, by its index.

    `cut_off`: the text continues after `input_ids`, which already exceed the limit.
    """

    input_ids: list[int]
    labels: list[int]
    images: dict[int, tuple[int, int]]
    cut_off: bool = False

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


class LabelledTemplate:
    """A template of the library whose tokens get labels. A conversation it has no form for is a `Reject`."""

    def __init__(self, renderer: BaseTemplate) -> None:
        self.renderer = renderer
        self.tokenizer = renderer.tokenizer

    def spans(self, messages: Sequence[Message], generation: bool = False) -> list[list[Span]]:
        with rejecting():
            return self.renderer.spans(messages, generation)

    def encode_spans(self, chunks: list[list[Span]], placeholders: Sequence[str], limit: int | None = None) -> Encoded:
        """Ids and labels. With `limit`, text after the first `limit` tokens need not be tokenized; these are the same."""
        with rejecting():
            found = self.renderer.encode_spans(chunks, placeholders, limit)
        labels = [token if marked else IGNORE for token, marked in zip(found.input_ids, found.supervised, strict=True)]
        return Encoded(found.input_ids, labels, found.images, found.cut_off)

    def encode(self, messages: Sequence[Message], placeholders: Sequence[str]) -> tuple[list[int], list[int]]:
        """`input_ids` and `labels` (L,) of a whole conversation; `placeholders[k]` stands for the media of index `k`."""
        encoded = self.encode_spans(self.spans(messages), placeholders)
        return encoded.input_ids, encoded.labels

    def prompt(self, messages: Sequence[Message], placeholders: Sequence[str]) -> list[int]:
        """`input_ids` (L,) up to where the model is to answer the last message."""
        return self.encode_spans(self.spans(messages, generation=True), placeholders).input_ids


def get_template(name: str, processor: Any) -> LabelledTemplate:
    """The template called `name` for this processor.

    Raises:
        ValueError: for a name there is no file for, or where the processor lacks what the template needs.
    """
    return LabelledTemplate(get_renderer(name, processor))
