"""Frames of a video: a file (with PyAV), the bytes of one, a folder of frames, or a list of frame files."""

from __future__ import annotations

import io
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from visionzip.images import MAX_PIXELS, ImageError, as_spelled, decode_image, open_regular

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

FAR = 64
"""Frames. When the next wanted one is further away than this, seeking to the key frame before it beats decoding all between."""


def decode_video(
    source: str | os.PathLike[str] | bytes | Sequence[str], count: int, max_pixels: int = MAX_PIXELS
) -> list[Image.Image]:
    """`count` RGB frames, evenly from the first to the last; all of them where there are no more.

    Args:
        source: a file, the bytes of one, a folder of frames, or a list of frame files.
        max_pixels: of a frame.

    Raises:
        ImageError: for what can't be read, also where only a wanted frame can't be.
        ValueError: for a video file where PyAV is missing.
    """
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return _decode_files(source, count, max_pixels)
    if not isinstance(source, bytes):
        path = os.fspath(source)
        folder = as_spelled(path) if "\0" not in path else path
        if "\0" not in folder and os.path.isdir(folder):
            names = [name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES)]
            files = [os.path.join(folder, name) for name in sorted(names, key=_natural)]
            if not files:
                raise ImageError("unreadable video", f"contains no frames: {', '.join(FRAME_SUFFIXES)}", folder)
            return _decode_files(files, count, max_pixels)
        source = path
    return _decode_file(source, count, max_pixels)


def spread_evenly(total: int, count: int) -> list[int]:
    """`count` indices from the first to the last of `total`, evenly spaced; all of them where there are no more."""
    if total <= count:
        return list(range(total))
    return [int(index) for index in np.linspace(0, total - 1, count).round()]


def _decode_files(files: Sequence[str], count: int, max_pixels: int) -> list[Image.Image]:
    return [decode_image(files[index], max_pixels) for index in spread_evenly(len(files), count)]


def _natural(name: str) -> list[Any]:
    """Order `frame_2` before `frame_10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _decode_file(source: str | bytes, count: int, max_pixels: int) -> list[Image.Image]:
    """The times of all frames are read first, without decoding: files often state no frame count, or a wrong one. Where there are
    none (raw H.264), or too few frames at them (AVI with frames stored out of order), everything is decoded."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ValueError("reading video files needs PyAV: pip install 'visionzip-ft[video]'") from error

    name = "" if isinstance(source, bytes) else source
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        try:
            frames = _seek_frames(file, count, max_pixels)
            return _count_frames(file, count, max_pixels) if frames is None else frames
        except ImageError as error:
            raise error.of(name) from error
        except Exception as error:  # PyAV raises a class an FFmpeg error code, besides ValueError and OSError
            raise ImageError("unreadable video", f"{type(error).__name__}: {error}", name) from error


@contextmanager
def _opened(file: BinaryIO, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The container from its beginning, and its first video stream."""
    import av

    file.seek(0)
    with av.open(file, mode="r", metadata_errors="ignore") as container:
        if not container.streams.video:
            raise ImageError("unreadable video", "no video stream")
        stream = container.streams.video[0]
        _check_size(stream, max_pixels)
        yield container, stream


def _check_size(image: Any, max_pixels: int) -> None:
    """Of the stream as it says, and of each frame taken: a size may change on the way, or be told wrong."""
    if (image.width or 0) * (image.height or 0) > max_pixels:
        raise ImageError("image too large", f"video of {image.width} × {image.height} pixels")


def _seek_frames(file: BinaryIO, count: int, max_pixels: int) -> list[Image.Image] | None:
    """The frames at `count` of the container's times; None where these do not lead to frames."""
    with _opened(file, max_pixels) as (container, stream):
        times = sorted({packet.pts for packet in container.demux(stream) if packet.pts is not None})
        if not times:
            return None
    wanted = [times[index] for index in spread_evenly(len(times), count)]
    with _opened(file, max_pixels) as (container, stream):  # opened again: not every container seeks to its beginning
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


def _count_frames(file: BinaryIO, count: int, max_pixels: int) -> list[Image.Image]:
    """`count` frames by their number, all decoded twice: once to count them."""
    with _opened(file, max_pixels) as (container, stream):
        total = sum(1 for _ in container.decode(stream))
    if not total:
        raise ImageError("unreadable video", "no frames")
    wanted = set(spread_evenly(total, count))
    found = []
    with _opened(file, max_pixels) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                _check_size(frame, max_pixels)
                found.append(frame.to_image())
    return found
