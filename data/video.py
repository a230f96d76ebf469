"""Frames of a video file, with PyAV."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from PIL import Image

from data.media import open_regular, uniform
from data.sample import Reject

FAR = 64
"""Frames. When the next wanted one is further away than this, seeking to the key frame before it beats decoding all between."""


def decode_frames(source: str | bytes, count: int, max_pixels: int) -> list[Image.Image]:
    """`count` RGB frames, uniformly over the frames there are.

    The times of all frames are read first, without decoding: files often state no frame count, or a wrong one. Raises `Reject`
    for what can't be read, also where only a wanted frame can't be.
    """
    try:
        import av
    except ImportError as error:
        raise RuntimeError("reading video files needs PyAV: pip install 'visionzip-ft[video]'") from error

    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        try:
            with av.open(file, mode="r", metadata_errors="ignore") as container:
                if not container.streams.video:
                    raise Reject("unreadable video", "no video stream")
                stream = container.streams.video[0]
                if (stream.width or 0) * (stream.height or 0) > max_pixels:
                    raise Reject("picture too large", f"video of {stream.width}×{stream.height}")
                times = sorted({packet.pts for packet in container.demux(stream) if packet.pts is not None})
                if not times:
                    raise Reject("unreadable video", "no frames")
                wanted = [times[index] for index in uniform(len(times), count)]
                return [frame.to_image() for frame in _at(container, stream, times, wanted)]
        except Reject:
            raise
        except Exception as error:  # PyAV raises a class an FFmpeg error code, besides ValueError and OSError
            raise Reject("unreadable video", f"{type(error).__name__}: {error}") from error


def _at(container: Any, stream: Any, times: list[int], wanted: list[int]) -> Iterator[Any]:
    """The decoded frame of each wanted time, in order."""
    container.seek(times[0], stream=stream)
    frames = container.decode(stream)
    position = 0
    for time in wanted:
        if bisect_left(times, time) - position > FAR:
            container.seek(time, stream=stream)  # to the key frame at or before it
            frames = container.decode(stream)
        for frame in frames:
            if frame.pts is not None and frame.pts >= time:
                position = bisect_left(times, frame.pts) + 1
                yield frame
                break
        else:
            raise Reject("unreadable video", f"the frame at {float(time * stream.time_base):.2f} s can't be decoded")
