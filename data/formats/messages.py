"""ShareGPT / OpenAI style: `{"messages": [{"role", "content"}], "images": [...]}`.

`content` is a string with `<image>` markers, or a list of parts (`{"type": "text", "text"}`, `{"type": "image", …}`,
`{"type": "image_url", "image_url": {"url"}}`, `{"type": "video", …}`). In a list, text is text and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from data.formats.common import (
    ROLES,
    Columns,
    Draft,
    Marker,
    RecordSource,
    get_column,
    record_media,
    split_markers,
    to_media,
)
from data.sample import Reject

PRIORITY = 20


def matches(record: Mapping[str, Any], columns: Columns) -> bool:
    return any(isinstance(record.get(key), list) for key in _columns(columns))


def _columns(columns: Columns) -> tuple[str, ...]:
    return (columns.conversations,) if columns.conversations else ("messages", "conversation", "conversations")


def read(record: Mapping[str, Any], source: RecordSource) -> Draft:
    turns = get_column(record, source.columns.conversations, *_columns(source.columns))
    if not isinstance(turns, list):
        raise Reject("wrong type", f"messages must be a list, found {type(turns).__name__}")
    parsed = []
    for turn in turns:
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise Reject("wrong type", f'a turn must be {{"role", "content"}}, found {turn!r:.120}')
        parsed.append((turn["role"], _content(turn["role"], turn["content"], source.root)))
    return Draft(
        parsed,
        record_media(record, source),
        get_column(record, source.columns.id, "id"),
        get_column(record, source.columns.types, "types"),
    )


def _content(role: Any, content: Any, root: str) -> list[str | Marker]:
    if isinstance(content, str):
        answer = isinstance(role, str) and ROLES.get(role.lower()) == "assistant"
        return [content] if answer else split_markers(content)
    if not isinstance(content, list):
        raise Reject("wrong type", f"content must be a string or a list, found {type(content).__name__}")
    parts: list[str | Marker] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind in ("image", "image_url", "video", "video_url"):
            parts.append(_marker("video" if kind.startswith("video") else "image", part, root))
        else:
            raise Reject("wrong type", f"a part must be text, image or video, found {part!r:.120}")
    return parts


def _marker(kind: Literal["image", "video"], part: Mapping[str, Any], root: str) -> Marker:
    value = next(
        (part[key] for key in (kind, f"{kind}_url", "url", "path", "bytes") if part.get(key) is not None), None
    )
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    return Marker(kind, None if value is None else to_media(kind, value, root))
