"""LLaVA JSON: `{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}`.

`image` is a path or a list of them, absent in text-only records; `<image>` in a text says where each stands. LLaVA-NeXT-Data
(embedded images) and LLaVA-Video (`video`) are laid out the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.formats.common import ROLES, Columns, Draft, RecordSource, get_column, record_media, split_markers
from data.sample import Reject

PRIORITY = 10


def matches(record: Mapping[str, Any], columns: Columns) -> bool:
    turns = record.get(columns.conversations or "conversations")
    return isinstance(turns, list) and (not turns or not isinstance(turns[0], Mapping) or "from" in turns[0])


def read(record: Mapping[str, Any], source: RecordSource) -> Draft:
    turns = get_column(record, source.columns.conversations, "conversations")
    if not isinstance(turns, list):
        raise Reject("wrong type", f"conversations must be a list, found {type(turns).__name__}")
    parsed = []
    for turn in turns:
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise Reject("wrong type", f'a turn must be {{"from", "value"}}, found {turn!r:.120}')
        who, text = turn["from"], turn["value"]
        # In an answer the marker is text like any other: nothing there could be shown to the model.
        answer = isinstance(who, str) and ROLES.get(who.lower()) == "assistant" and isinstance(text, str)
        parsed.append((who, [text] if answer else split_markers(text)))
    return Draft(
        parsed,
        record_media(record, source),
        get_column(record, source.columns.id, "id"),
        get_column(record, source.columns.types, "types"),
    )
