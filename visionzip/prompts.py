"""Conversation → text → token ids: the one renderer, for training, evaluation, the chat, the app and lmms-eval.

A template writes a conversation as spans of text and says of each span whether it is supervised and who wrote it. Everything
else is common to all templates and lives here: tokenizing so that ids are those of the whole text, carrying the spans' marks
over to tokens, and keeping text of users apart from control tokens.

A template is one file in ``visionzip/templates/`` with a class ``Template(BaseTemplate)`` that has
``spans(messages, generation) -> list[list[Span]]``; the file's name is the template's.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from visionzip import templates

Role = Literal["system", "user", "assistant"]

MARGIN = 64
"""Tokens. What is tokenized beyond a limit, so that where the text was cut off can't show in the tokens before the limit."""


class PromptError(ValueError):
    """A conversation a template has no form for. `reason`: a short phrase, to count by. `detail`: what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple:
        return (type(self), (self.reason, self.detail))


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an image or a video stands in a message; `index` counts over all of the conversation's."""

    kind: Literal["image", "video"]
    index: int


@dataclass(slots=True)
class Message:
    """Text and slots in order. A text never has to be searched for a marker: whatever a user wrote stays text."""

    role: Role
    parts: list[str | Slot]

    @property
    def text(self) -> str:
        """The words alone, images left out."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def slots(self) -> list[Slot]:
        return [part for part in self.parts if isinstance(part, Slot)]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the written conversation.

    `trusted`: written by the template, so control tokens in it are meant. Text of a user or a record never is.
    `slot`: the span stands for the image or video of that index and is replaced by its placeholders; `text` is then ignored.
    """

    text: str = ""
    supervised: bool = False
    trusted: bool = False
    slot: int | None = None


@dataclass(slots=True)
class Encoded:
    """`input_ids` and `supervised` (L,), `images`: the half-open token range of each image or video, by its index.

    `cut_off`: tokens there would be more of were not tokenized, and images among them have a range beyond the end.
    """

    input_ids: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    images: dict[int, tuple[int, int]] = field(default_factory=dict)
    cut_off: bool = False


class BaseTemplate(ABC):
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

    @abstractmethod
    def spans(self, messages: Sequence[Message], generation: bool = False) -> list[list[Span]]:
        """The conversation as chunks of spans; each chunk is tokenized as a text of its own.

        With `generation` the text ends where the model is to answer. Raises `PromptError` for a conversation it has no form for.
        """

    def render(self, messages: Sequence[Message], placeholders: Sequence[str]) -> str:
        """The prompt as one string, for whoever wants to read it. `placeholders[k]` stands for the image of index `k`."""
        spans = [span for chunk in self.spans(messages, generation=True) for span in chunk]
        return "".join(span.text if span.slot is None else placeholders[span.slot] for span in spans)

    def prompt(self, messages: Sequence[Message], placeholders: Sequence[str]) -> list[int]:
        """`input_ids` (L,) up to where the model is to answer the last message."""
        return self.encode_spans(self.spans(messages, generation=True), placeholders).input_ids

    def encode_spans(self, chunks: list[list[Span]], placeholders: Sequence[str], limit: int | None = None) -> Encoded:
        """Tokenize. With `limit`, text that can't be among the first `limit` tokens is left out, and these are the same."""
        encoded = Encoded()
        if self._bos and not _starts_with(chunks, self.tokenizer.bos_token):
            encoded.input_ids += self._bos
            encoded.supervised.append(False)
        pieces = ((piece, n > 0) for chunk in chunks for n, piece in enumerate(self._pieces(chunk, placeholders)))
        for piece, inner in pieces:
            if limit is not None and len(encoded.input_ids) > limit:
                encoded.cut_off = True
                break
            self._encode_piece(piece, inner, encoded, limit)
        if encoded.cut_off:
            beyond = len(encoded.input_ids)
            slots = [
                span.slot for chunk in chunks for span in chunk if span.slot is not None and placeholders[span.slot]
            ]
            encoded.images |= {slot: (beyond, beyond + 1) for slot in slots if slot not in encoded.images}
        return encoded

    def _pieces(self, chunk: list[Span], placeholders: Sequence[str]) -> Iterator[_Piece]:
        """Join a chunk's spans, but break control tokens that a user's text spells behind their first character.

        Broken in two, and each part tokenized alone, no added token can match, special or not.
        """
        piece = _Piece()
        for span in chunk:
            if span.slot is not None:
                piece.add(placeholders[span.slot], False, span.slot)
            elif span.trusted or not self._control.search(span.text):
                piece.add(span.text, span.supervised)
            else:
                start = 0
                for match in self._control.finditer(span.text):
                    if len(match[0]) == 1:
                        raise PromptError(
                            "template", f"{match[0]!r} is a control token here and can't be written as text"
                        )
                    piece.add(span.text[start : match.start() + 1], span.supervised)
                    yield piece
                    piece = _Piece()
                    start = match.start() + 1
                piece.add(span.text[start:], span.supervised)
        yield piece

    def _encode_piece(self, piece: _Piece, inner: bool, encoded: Encoded, limit: int | None) -> None:
        """Tokenize one piece and append it. `inner`: it continues a text, so no prefix space may be put before it."""
        if not piece.text:
            return
        base = len(encoded.input_ids)
        text, ids, offsets = self._tokenize_up_to(piece.text, None if limit is None else limit - base)
        skip = 0
        if inner:  # a newline before it keeps SentencePiece from taking it for the start of a text
            shifted, shifted_offsets = self._tokenize("\n" + text)
            width = len(self._newline_ids)
            if shifted[:width] == self._newline_ids:
                ids, offsets, skip = shifted[width:], shifted_offsets[width:], 1
        encoded.input_ids += ids
        marks = _mark_tokens(offsets, piece.intervals, skip)
        encoded.supervised += [mark == _SUPERVISED for mark in marks]
        for position, mark in enumerate(marks, start=base):
            if mark is not None and mark >= 0:
                first, _ = encoded.images.get(mark, (position, position))
                encoded.images[mark] = (first, position + 1)
        if len(text) < len(piece.text):
            encoded.cut_off = True
            for start, end, mark in piece.intervals:
                if start < len(text) < end and mark != _SUPERVISED:  # cut in the middle: it ends behind all there is
                    first, _ = encoded.images.get(mark, (base, base))
                    encoded.images[mark] = (first, len(encoded.input_ids) + 1)

    def _tokenize_up_to(self, text: str, limit: int | None) -> tuple[str, list[int], list[tuple[int, int]]]:
        """As much of `text` as makes more than `limit` tokens for sure, its ids and offsets.

        That many tokens, `MARGIN` more and each the longest there is: of a text with more characters, the tokens within the limit
        end at least `MARGIN` of these lengths before it is cut off. A normalizer may make less of it (runs of spaces become one):
        then twice as much is taken.
        """
        length = len(text) if limit is None else (limit + MARGIN) * self._longest
        while True:
            part = text[:length]
            ids, offsets = self._tokenize(part)
            if len(part) == len(text) or limit is None or len(ids) >= limit + MARGIN:
                return part, ids, offsets
            length *= 2

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max((len(token) for token in self.tokenizer.get_vocab()), default=1)

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except (UnicodeError, TypeError) as error:
            raise PromptError("not UTF-8", _surrogate(text)) from error
        return out["input_ids"], out["offset_mapping"]


_SUPERVISED = -1


class _Piece:
    """A text tokenized in one go; `intervals` are (start, end, mark) with an image's index or `_SUPERVISED` as the mark."""

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
    """What a user's text must not be able to write: special tokens, media placeholders, added tokens of the chat template.

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


def template_names() -> list[str]:
    """Every template there is, found by file so that a new one needs no registration elsewhere."""
    return sorted(module.name for module in pkgutil.iter_modules(templates.__path__))


def get_template(name: str, processor: Any) -> BaseTemplate:
    """The template called `name` for this processor.

    Raises:
        ValueError: for a name there is no file for, or where the processor lacks what the template needs.
    """
    if name not in template_names():
        raise ValueError(f"there is no template {name!r}; expected one of {', '.join(template_names())}")
    return importlib.import_module(f"visionzip.templates.{name}").Template(processor)


def usual_template(processor: Any) -> BaseTemplate:
    """The processor's own chat template, or LLaVA-1.5's conversation for a processor that has none."""
    return get_template(usual_template_name(processor), processor)


def usual_template_name(processor: Any) -> str:
    """The name of `usual_template`."""
    return "chat" if getattr(processor, "chat_template", None) else "llava_v1"


def question(text: str, images: int = 1) -> Message:
    """A user's turn that shows the first `images` images of a conversation, then asks."""
    return Message("user", [*(Slot("image", index) for index in range(images)), f"\n{text}" if images else text])
