"""The Cauldron: `{"images": [image, …], "texts": [{"user", "assistant", "source"}, …]}`; all images belong to the first turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.formats.common import Columns, Draft, Marker, RecordSource, get_column, record_media
from data.sample import Reject

PRIORITY = 30


def matches(record: Mapping[str, Any], columns: Columns) -> bool:
    texts = record.get(columns.conversations or "texts")
    return isinstance(texts, list) and (not texts or (isinstance(texts[0], Mapping) and "user" in texts[0]))


def read(record: Mapping[str, Any], source: RecordSource) -> Draft:
    texts = get_column(record, source.columns.conversations, "texts")
    if not isinstance(texts, list):
        raise Reject("wrong type", f"texts must be a list, found {type(texts).__name__}")
    turns: list[tuple[Any, list[str | Marker]]] = []
    for text in texts:
        if not isinstance(text, Mapping) or not all(isinstance(text.get(side), str) for side in ("user", "assistant")):
            raise Reject("wrong type", f'a round must be {{"user", "assistant"}}, found {text!r:.120}')
        turns += [("user", [text["user"]]), ("assistant", [text["assistant"]])]
    return Draft(
        turns,
        record_media(record, source),
        get_column(record, source.columns.id, "id"),
        get_column(record, source.columns.types, "types"),
    )
