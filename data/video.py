"""Frames of a video file, with PyAV."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from PIL import Image

from data.media import open_regular, uniform
from data.sample import Reject

FAR = 64
"""Frames. When the next wanted one is further away than this, seeking to the key frame before it beats decoding all between."""


def decode_frames(source: str | bytes, count: int, max_pixels: int) -> list[Image.Image]:
    """`count` RGB frames, uniformly over the frames there are.

    The times of all frames are read first, without decoding: files often state no frame count, or a wrong one. Where there are
    none (raw H.264), or too few frames at them (AVI with frames stored out of order), everything is decoded. Raises `Reject` for
    what can't be read, also where only a wanted frame can't be.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise RuntimeError("reading video files needs PyAV: pip install 'visionzip-ft[video]'") from error

    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        try:
            frames = _sought(file, count, max_pixels)
            return _counted(file, count, max_pixels) if frames is None else frames
        except Reject:
            raise
        except Exception as error:  # PyAV raises a class an FFmpeg error code, besides ValueError and OSError
            raise Reject("unreadable video", f"{type(error).__name__}: {error}") from error


@contextmanager
def _opened(file: BinaryIO, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The container from its beginning, and its first video stream."""
    import av

    file.seek(0)
    with av.open(file, mode="r", metadata_errors="ignore") as container:
        if not container.streams.video:
            raise Reject("unreadable video", "no video stream")
        stream = container.streams.video[0]
        _check_size(stream, max_pixels)
        yield container, stream


def _check_size(picture: Any, max_pixels: int) -> None:
    """Of the stream as it says, and of each frame taken: a size may change on the way, or be told wrong."""
    if (picture.width or 0) * (picture.height or 0) > max_pixels:
        raise Reject("picture too large", f"video of {picture.width}×{picture.height}")


def _sought(file: BinaryIO, count: int, max_pixels: int) -> list[Image.Image] | None:
    """The frames at `count` of the container's times; None where these do not lead to frames."""
    with _opened(file, max_pixels) as (container, stream):
        times = sorted({packet.pts for packet in container.demux(stream) if packet.pts is not None})
        if not times:
            return None
    wanted = [times[index] for index in uniform(len(times), count)]
    with _opened(file, max_pixels) as (container, stream):  # opened anew: not every container seeks to its beginning
        frames = container.decode(stream)
        found: list[Image.Image] = []
        position = 0
        for time in wanted:
            if bisect_left(times, time) - position > FAR:
                container.seek(time, stream=stream)  # to the key frame at or before it
                frames = container.decode(stream)
            frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)
            if frame is None:
                return None
            position = bisect_left(times, frame.pts) + 1
            _check_size(frame, max_pixels)
            found.append(frame.to_image())
        return found


def _counted(file: BinaryIO, count: int, max_pixels: int) -> list[Image.Image]:
    """`count` frames by their number, all decoded twice: once to count them."""
    with _opened(file, max_pixels) as (container, stream):
        total = sum(1 for _ in container.decode(stream))
    if not total:
        raise Reject("unreadable video", "no frames")
    wanted = set(uniform(total, count))
    found = []
    with _opened(file, max_pixels) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                _check_size(frame, max_pixels)
                found.append(frame.to_image())
    return found
