"""The one form every record takes, and how a record that can't be used is told from one that can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from visionzip.images import ImageError
from visionzip.prompts import Message, PromptError, Role, Slot

__all__ = [
    "NO_SAMPLE",
    "NO_SAMPLE_INDEX",
    "Media",
    "Message",
    "NoSample",
    "Reject",
    "Rejection",
    "Role",
    "Sample",
    "Slot",
]


@dataclass(frozen=True, slots=True)
class Media:
    """An image or video not yet read.

    `source` is a path, the bytes of a file, or for a video also a list of paths (one a frame). Paths are already inside the
    image root: the format that made this refuses others.
    """

    kind: Literal["image", "video"]
    source: str | bytes | list[str]


@dataclass(slots=True)
class Sample:
    """One conversation. `messages` alternate user and assistant after an optional system message and end with an answer.

    `id` is the record's own (`#<position>` where it has none), `source` the name of the data source, `types` one question type
    a round where the record names them, `budget` the (dominant, contextual) at which its images are read, where it is not the one in
    force (`data.elastic`).
    """

    id: str
    messages: list[Message]
    media: list[Media] = field(default_factory=list)
    source: str = ""
    types: list[str] | None = None
    budget: tuple[int | float, int | float] | None = None


class Reject(Exception):
    """Raised inside the pipeline for a record that can't be used; never leaves `Dataset.__getitem__`.

    `reason` is one of a small set of short phrases that are counted (listed in docs/data.md); `detail` says what was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@contextmanager
def rejecting() -> Iterator[None]:
    """What the library says of an image or a conversation that can't be used, as a `Reject`."""
    try:
        yield
    except ImageError as error:
        raise Reject(error.reason, ": ".join(filter(None, (error.name, error.detail)))) from error
    except PromptError as error:
        raise Reject(error.reason, error.detail) from error


LONGEST = 500
"""Characters of a rejected record's id or detail that are kept: it says what was wrong, not all that was there."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """What a dataset returns in place of an item it could not make.

    Texts that came from the record are cut to `LONGEST` and hold nothing UTF-8 can't say (half a surrogate pair is escaped):
    they are printed and written to files.
    """

    id: str
    source: str
    index: int
    reason: str
    detail: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", sayable(self.id))
        object.__setattr__(self, "detail", sayable(self.detail))

    def as_dict(self) -> dict[str, str | int]:
        return {
            "id": self.id,
            "source": self.source,
            "index": self.index,
            "reason": self.reason,
            "detail": self.detail,
        }


def sayable(text: str) -> str:
    """A text of a record, short and as characters that can be printed and written as UTF-8."""
    short = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return short.encode("utf-8", "backslashreplace").decode()


class NoSample:
    """The item of the padding index −1: it evens out the last global batch and stands for nothing."""

    _instance: NoSample | None = None

    def __new__(cls) -> NoSample:
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __reduce__(self) -> tuple:
        return (NoSample, ())

    def __repr__(self) -> str:
        return "NO_SAMPLE"


NO_SAMPLE = NoSample()
NO_SAMPLE_INDEX = -1
