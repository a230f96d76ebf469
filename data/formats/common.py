"""What every record layout needs: images of a record, markers in its texts, the order of turns."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from data.sample import Media, Message, Reject, Role, Sample, Slot, sayable

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
_MARKER = re.compile("<(image|video)>")
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")


class Columns(BaseModel):
    """Which column of a record holds what, where the names are not the usual ones. Dots reach into nested records (`meta.id`)."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    image: str | None = Field(default=None, description="an image or a list of images")
    video: str | None = None
    conversations: str | None = Field(default=None, description="the list of turns")
    question: str | None = None
    answer: str | None = Field(default=None, description="an answer, or a list of which the first is taken")
    caption: str | None = None
    types: str | None = Field(default=None, description="one question type per round")


@dataclass(frozen=True)
class RecordSource:
    """What a layout has to know of where a record comes from. `root`: absolute folder all of its paths must lie in."""

    label: str
    format: str
    root: str
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True, slots=True)
class Marker:
    """Where an image stands in a text. `media` is set where the record names the image right there."""

    kind: Literal["image", "video"]
    media: Media | None = None


@dataclass(slots=True)
class Draft:
    """A record's turns (role as the record calls it) and the media that markers without one of their own stand for."""

    turns: list[tuple[Any, list[str | Marker]]]
    media: list[Media]
    id: Any = None
    types: Any = None


def get_column(record: Mapping[str, Any], name: str | None, *defaults: str) -> Any:
    """The mapped column (dots reach into nested records), else the first of `defaults` that is there and not null."""
    if name is not None:
        value: Any = record
        for step in name.split("."):
            if not isinstance(value, Mapping) or step not in value:
                raise Reject("unknown layout", f"no column {name!r}; there are {sorted(map(str, record))}")
            value = value[step]
        return value
    return next((record[key] for key in defaults if record.get(key) is not None), None)


def split_markers(text: Any) -> list[str | Marker]:
    """`"a <image> b"` → `["a ", Marker("image"), " b"]`."""
    if not isinstance(text, str):
        raise Reject("wrong type", f"a turn's text must be a string, found {type(text).__name__}")
    parts: list[str | Marker] = []
    for number, piece in enumerate(_MARKER.split(text)):
        if number % 2:
            parts.append(Marker("video" if piece == "video" else "image"))
        elif piece:
            parts.append(piece)
    return parts


def record_media(record: Mapping[str, Any], source: RecordSource) -> list[Media]:
    """Images, then videos, of the usual columns or the mapped ones."""
    columns = source.columns
    images = get_column(record, columns.image, *(() if columns.video else ("image", "images")))
    videos = get_column(record, columns.video, *(() if columns.image else ("video", "videos")))
    return [*_media("image", images, source.root), *_media("video", videos, source.root)]


def _media(kind: Literal["image", "video"], value: Any, root: str) -> Iterable[Media]:
    if value is None or value == "" or value == []:
        return []
    return [to_media(kind, item, root) for item in (value if isinstance(value, list) else [value])]


def to_media(kind: Literal["image", "video"], value: Any, root: str) -> Media:
    """A path, a `{"bytes", "path"}` pair as `datasets` stores images, raw bytes, or a list of frame paths."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Media(kind, bytes(value))
    if isinstance(value, str):
        if value.startswith("data:"):
            return Media(kind, _data_uri(value))
        return Media(kind, resolve_path(root, value))
    if kind == "video" and isinstance(value, list) and value:
        return Media(kind, [resolve_path(root, item) for item in value])
    raise Reject("wrong type", f"a {kind} must be a path or bytes, found {type(value).__name__}")


def _data_uri(value: str) -> bytes:
    head, _, body = value.partition(",")
    if not head.endswith(";base64"):
        raise Reject("wrong type", f"a data: URI must be base64, found {head[:40]!r}")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:  # also what is not ASCII
        raise Reject("unreadable image", f"broken base64: {error}") from error


def resolve_path(root: str, path: Any) -> str:
    """`path` inside `root`, absolute. Raises `Reject` where it leads out.

    By name, not by following links: a link that the owner of the folder put there (`coco -> /data/coco`) is theirs to make,
    a `..` in a record is not. A backslash counts as a separator too here, since `visionzip.images.as_spelled` may read it as one.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise Reject("wrong type", f"a path must be a non-empty string, found {path!r:.80}")
    if _URL.match(path):
        raise Reject("remote image", f"{path[:200]}: nothing is downloaded during training; fetch it first")
    full = os.path.normpath(os.path.join(root, path))
    for each in {full, os.path.normpath(os.path.join(root, path.replace("\\", "/")))}:
        if os.path.commonpath([root, each]) != root:
            raise Reject("path outside the image root", f"{path[:200]} is not in {root}")
    return full


def build_sample(draft: Draft, source: RecordSource, position: int) -> Sample:
    """Check a draft's turns, put its images where they belong, and make the `Sample`."""
    if not draft.turns:
        raise Reject("empty conversation")
    turns = [(_role(role), parts) for role, parts in draft.turns]
    media = _place(turns, list(draft.media))
    messages = _messages(turns)
    answers = sum(message.role == "assistant" for message in messages)
    return Sample(
        id=record_id(draft.id, position),
        messages=messages,
        media=_only_used(messages, media),
        source=source.label,
        types=_types(draft.types, answers),
    )


def record_id(value: Any, position: int) -> str:
    """The record's own id where it has one of a simple type, else its position."""
    return sayable(str(value)) if isinstance(value, (str, int)) and value != "" else f"#{position}"


def _role(name: Any) -> Role:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Reject("unknown role", f"{name!r:.80}; known: {', '.join(ROLES)}")
    return role


def _place(turns: list[tuple[Role, list[str | Marker]]], media: list[Media]) -> list[Media]:
    """Give every marker its media, in order and by kind; turn markers into slots in place. Returns all media in slot order.

    An `<image>` marker also stands for a video where the record has no `<video>` marker (LLaVA-Video writes it so). Media
    without any marker go to the front of the first user turn.
    """
    open_markers = [part for _, parts in turns for part in parts if isinstance(part, Marker) and part.media is None]
    if media and not open_markers:
        front: list[str | Marker] = [Marker(item.kind, item) for item in media]
        first = next((parts for role, parts in turns if role == "user"), None)
        if first is None:
            raise Reject("empty conversation", "images, but no user turn to put them in")
        if first and isinstance(first[0], str):
            first[0] = "\n" + first[0].removeprefix("\n")
        first[:0] = front
        media = []
    elif len(media) != len(open_markers):
        raise Reject("image count", f"{len(open_markers)} markers in the text, {len(media)} images given")
    if any(marker.kind == "video" for marker in open_markers):
        queues = {kind: [item for item in media if item.kind == kind] for kind in ("image", "video")}
    else:
        queues = {"image": media, "video": []}
    placed: list[Media] = []
    for _, parts in turns:
        for number, part in enumerate(parts):
            if isinstance(part, Marker):
                if part.media is None and not queues[part.kind]:
                    raise Reject("image count", f"more <{part.kind}> markers than {part.kind}s given")
                placed.append(part.media or queues[part.kind].pop(0))
                parts[number] = Slot(placed[-1].kind, len(placed) - 1)  # type: ignore[call-overload]
    return placed


def _messages(turns: list[tuple[Role, list[Any]]]) -> list[Message]:
    """Alternating turns from a user's to an assistant's, after an optional system message."""
    messages = [Message(role, _joined(parts)) for role, parts in turns]
    system = [messages.pop(0)] if messages[0].role == "system" else []
    if any(message.slots for message in system):
        raise Reject("misplaced image", "in the system message")
    if messages and messages[0].role == "assistant":  # as LLaVA does: a greeting before the first question is skipped
        messages.pop(0)
    for message, role in zip(messages, ("user", "assistant") * len(messages), strict=False):
        if message.role != role:
            raise Reject("turn order", f"expected a turn of the {role}, found {message.role}")
        if role == "user" and not message.slots and not message.text.strip():
            raise Reject("empty question")
        if role == "assistant" and message.slots:
            raise Reject("misplaced image", "in an answer")
    if len(messages) % 2:  # a last question nobody answered teaches nothing
        messages.pop()
    if not messages:
        raise Reject("no answer")
    if any(not message.text.strip() for message in messages if message.role == "assistant"):
        raise Reject("empty answer")
    return [*system, *messages]


def _joined(parts: list[str | Slot]) -> list[str | Slot]:
    """Neighbouring texts as one, empty ones left out."""
    joined: list[str | Slot] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def _only_used(messages: list[Message], media: list[Media]) -> list[Media]:
    """Leave out media of turns that were dropped; renumber the slots."""
    used = [slot for message in messages for slot in message.slots]
    for message in messages:
        message.parts = [
            Slot(part.kind, used.index(part)) if isinstance(part, Slot) else part for part in message.parts
        ]
    return [media[slot.index] for slot in used]


def _types(value: Any, rounds: int) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [value] * rounds
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value) or len(value) < rounds:
        raise Reject("wrong type", f"types must be one string per round ({rounds}), found {value!r:.120}")
    return value[:rounds]
