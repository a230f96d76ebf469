"""Conversation → token ids and loss mask.

A template writes a conversation as spans of text and says of each span whether it is supervised and who wrote it. Everything
else is common to all templates and lives here: tokenizing so that ids are those of the whole text, carrying the spans' marks
over to tokens, and keeping text of users apart from control tokens.

A template is one file in `data/templates/` with a class `Template(BaseTemplate)` that has
`spans(messages, generation) -> list[list[Span]]`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.sample import Message, Reject
from data.templates import names

IGNORE = -100
"""Label of a token that is not supervised (torch's and transformers' own ignore index)."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the written conversation.

    `trusted`: written by the template, so control tokens in it are meant. Text of a record never is.
    `slot`: the span stands for the media of that index and is replaced by its placeholders; `text` is then ignored.
    """

    text: str = ""
    supervised: bool = False
    trusted: bool = False
    slot: int | None = None


@dataclass(slots=True)
class Encoded:
    """`input_ids` and `labels` (L,), `pictures`: the half-open token range of each media, by media index."""

    input_ids: list[int]
    labels: list[int]
    pictures: dict[int, tuple[int, int]]

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


class BaseTemplate:
    """Holds the processor's tokenizer and turns spans into tokens."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(self.tokenizer).__name__} gives no character offsets, which the loss mask is made from; "
                "load a fast tokenizer (a tokenizer.json)"
            )
        self._control = _control_pattern(processor, self.tokenizer)
        self._newline_ids = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        bare = self.tokenizer("", add_special_tokens=True)["input_ids"]
        self._bos = [bare[0]] if bare and bare[0] == self.tokenizer.bos_token_id else []

    def spans(self, messages: Sequence[Message], generation: bool = False) -> list[list[Span]]:
        """The conversation as chunks of spans; each chunk is tokenized as a text of its own.

        With `generation` the text ends where the model is to answer. Raises `Reject` for a conversation it has no form for.
        """
        raise NotImplementedError

    def encode(self, messages: Sequence[Message], placeholders: Sequence[str]) -> tuple[list[int], list[int]]:
        """`input_ids` and `labels` (L,) of a whole conversation; `placeholders[k]` stands for the media of index `k`."""
        encoded = self.encode_spans(self.spans(messages), placeholders)
        return encoded.input_ids, encoded.labels

    def prompt(self, messages: Sequence[Message], placeholders: Sequence[str]) -> list[int]:
        """`input_ids` (L,) up to where the model is to answer the last message."""
        return self.encode_spans(self.spans(messages, generation=True), placeholders).input_ids

    def encode_spans(self, chunks: list[list[Span]], placeholders: Sequence[str]) -> Encoded:
        encoded = Encoded([], [], {})
        if self._bos and not _starts_with(chunks, self.tokenizer.bos_token):
            encoded.input_ids += self._bos
            encoded.labels += [IGNORE]
        for chunk in chunks:
            for number, piece in enumerate(self._pieces(chunk, placeholders)):
                self._encode_piece(piece, number > 0, encoded)
        return encoded

    def _pieces(self, chunk: list[Span], placeholders: Sequence[str]) -> list[_Piece]:
        """Join a chunk's spans, but break control tokens that a record's text spells behind their first character.

        Broken in two, and each part tokenized alone, no added token can match, special or not.
        """
        pieces = [_Piece()]
        for span in chunk:
            if span.slot is not None:
                pieces[-1].add(placeholders[span.slot], False, span.slot)
            elif span.trusted or not self._control.search(span.text):
                pieces[-1].add(span.text, span.supervised)
            else:
                start = 0
                for match in self._control.finditer(span.text):
                    if len(match[0]) == 1:
                        raise Reject("template", f"{match[0]!r} is a control token here and can't be written as text")
                    pieces[-1].add(span.text[start : match.start() + 1], span.supervised)
                    pieces.append(_Piece())
                    start = match.start() + 1
                pieces[-1].add(span.text[start:], span.supervised)
        return pieces

    def _encode_piece(self, piece: _Piece, inner: bool, encoded: Encoded) -> None:
        """Tokenize one piece and append it. `inner`: it continues a text, so no prefix space may be put before it."""
        if not piece.text:
            return
        skip = 0
        ids, offsets = self._tokenize(piece.text)
        if inner:  # a newline before it keeps SentencePiece from taking it for the start of a text
            shifted, shifted_offsets = self._tokenize("\n" + piece.text)
            width = len(self._newline_ids)
            if shifted[:width] == self._newline_ids:
                ids, offsets, skip = shifted[width:], shifted_offsets[width:], 1
        base = len(encoded.input_ids)
        encoded.input_ids += ids
        marks = _mark_tokens(offsets, piece.intervals, skip)
        encoded.labels += [token if mark == _SUPERVISED else IGNORE for token, mark in zip(ids, marks, strict=True)]
        for position, mark in enumerate(marks, start=base):
            if mark is not None and mark >= 0:
                first, _ = encoded.pictures.get(mark, (position, position))
                encoded.pictures[mark] = (first, position + 1)

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except (UnicodeError, TypeError) as error:
            raise Reject("not UTF-8", _surrogate(text)) from error
        return out["input_ids"], out["offset_mapping"]


_SUPERVISED = -1


class _Piece:
    """A text tokenized in one go; `intervals` are (start, end, mark) with a media's index or `_SUPERVISED` as the mark."""

    def __init__(self) -> None:
        self.text = ""
        self.intervals: list[tuple[int, int, int]] = []

    def add(self, text: str, supervised: bool, slot: int | None = None) -> None:
        start, self.text = len(self.text), self.text + text
        if text and (supervised or slot is not None):
            self.intervals.append((start, len(self.text), _SUPERVISED if slot is None else slot))


def _mark_tokens(offsets: list[tuple[int, int]], intervals: list[tuple[int, int, int]], skip: int) -> list[int | None]:
    """The mark of the interval each token overlaps, the later one where it overlaps two (a space and the word behind it)."""
    marks: list[int | None] = []
    current = 0
    for start, end in offsets:
        start, end = start - skip, end - skip
        while current < len(intervals) and intervals[current][1] <= start:
            current += 1
        mark, later = None, current
        while later < len(intervals) and intervals[later][0] < max(end, start + 1):
            mark = intervals[later][2]
            later += 1
        marks.append(mark)
    return marks


def _surrogate(text: str) -> str:
    """What in a text can't be encoded; JSON's `\\ud83d` escapes can spell such characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{text[error.start]!r} is half a surrogate pair"
    return "the tokenizer does not take this text"


def _starts_with(chunks: list[list[Span]], bos: str | None) -> bool:
    first = next((span for chunk in chunks for span in chunk if span.text or span.slot is not None), None)
    return bos is not None and first is not None and first.trusted and first.text.startswith(bos)


def _control_pattern(processor: Any, tokenizer: Any) -> re.Pattern[str]:
    """What a record's text must not be able to write: special tokens, media placeholders, added tokens of the chat template.

    Other added tokens (runs of spaces, words) stay what they are in ordinary text.
    """
    template = str(getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None) or "")
    placeholders = {getattr(processor, name, None) for name in ("image_token", "video_token", "audio_token")}
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content
        and (
            token.special
            or token.content in placeholders
            or (token.content in template and not token.content.isspace() and len(token.content) > 1)
        )
    ]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def get_template(name: str, processor: Any) -> BaseTemplate:
    """The template called `name` for this processor.

    Raises `ValueError` for a name there is no file for, or where the processor lacks what the template needs.
    """
    if name not in names():
        raise ValueError(f"there is no template {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"data.templates.{name}").Template(processor)
