"""Under which keys the tokens of an image are found: where it lies, and what is in it."""

from __future__ import annotations

import os

from data.cache.shards import Key, key_of
from data.sample import Media, Sample, rejecting
from visionzip.images import as_spelled, open_regular

BLANK = key_of(b"blank")


def one_of_several(sample: Sample, media: Media) -> bool:
    """Whether other images stand beside this one in its prompt. A video is none."""
    return media.kind == "image" and sum(other.kind == "image" for other in sample.media) > 1


def beside(key: Key) -> Key:
    """The key of an image's tokens where it is one of several in its prompt, for a family that encodes it otherwise then."""
    return key_of(b"beside others", *(half.to_bytes(8, "little") for half in key))


def name_of(media: Media) -> Key | None:
    """A key of where the media is; None where its bytes are in the record itself."""
    if isinstance(media.source, bytes):
        return None
    where = [media.source] if isinstance(media.source, str) else media.source
    return key_of(media.kind.encode(), *(os.fsencode(path) for path in where))


def stat_of(media: Media) -> tuple[int, int]:
    """(bytes, nanoseconds of the last change) of a single file; (-1, -1) where there is none."""
    if not isinstance(media.source, str):
        return -1, -1
    try:
        found = os.stat(media.source)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def content_key(media: Media, frames: int) -> Key:
    """A key of the bytes, wherever they are. Raises `Reject` for a file that can't be read."""
    kind = b"image" if media.kind == "image" else f"video {frames}".encode()
    if isinstance(media.source, bytes):
        return key_of(kind, media.source)
    folder = as_spelled(media.source) if isinstance(media.source, str) else ""
    if os.path.isdir(folder):
        paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
    else:
        paths = [media.source] if isinstance(media.source, str) else list(media.source)
    contents = []
    for path in paths:
        with rejecting(), open_regular(path) as file:
            contents.append(file.read())
    return key_of(kind, *contents)
