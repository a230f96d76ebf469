"""One question a record (`question`, `answer`) or a caption (`caption` or `text`), with its image beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.formats.common import Columns, Draft, Marker, RecordSource, get_column, record_media, split_markers
from data.sample import Reject

PRIORITY = 40
_ANSWERS = ("answer", "answers", "multiple_choice_answer")
_CAPTIONS = ("caption", "text")


def matches(record: Mapping[str, Any], columns: Columns) -> bool:
    mapped = columns.question or columns.caption
    return bool(mapped) or "question" in record or any(name in record for name in _CAPTIONS)


def read(record: Mapping[str, Any], source: RecordSource) -> Draft:
    columns = source.columns
    turns: list[tuple[Any, list[str | Marker]]]
    if columns.caption or (columns.question is None and "question" not in record):
        caption = _text(get_column(record, columns.caption, *_CAPTIONS), "caption")
        turns = [("user", []), ("assistant", [caption])]
    else:
        question = get_column(record, columns.question, "question")
        answer = _text(get_column(record, columns.answer, *_ANSWERS), "answer")
        turns = [("user", split_markers(question)), ("assistant", [answer])]
    return Draft(
        turns,
        record_media(record, source),
        get_column(record, columns.id, "id", "question_id"),
        get_column(record, columns.types, "types", "question_type"),
    )


def _text(value: Any, what: str) -> str:
    """A string, or the first of a list of them (several annotators answered)."""
    if isinstance(value, list):
        value = value[0] if value else ""
    if value is None:
        raise Reject("no answer")
    if not isinstance(value, str):
        raise Reject("wrong type", f"a {what} must be a string, found {type(value).__name__}")
    return value
