"""From an image of any shape to what the vision graph takes, with Pillow and numpy.

``image`` of ``device.json`` is what the model's image processor does, in order:

- ``steps``: ``["pad", [r, g, b]]`` to a square of that colour; ``["shortest", n]`` and ``["longest", n]``: that side becomes `n`, the
  other keeps the proportion (``longest`` rounds it up to an even number); ``["exact", [height, width]]``; ``["crop", [height, width]]``
  from the middle;
- ``resample``: Pillow's number of the filter;
- ``scale``, ``mean``, ``std``: ``(value · scale - mean) / std`` for each colour.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from visionzip.decode import decode_image, enlarge, pad_to_square, to_rgb


def open_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """An RGB image, of a file, its bytes, or an image that is open already.

    Raises:
        visionzip.decode.ImageError: (a ``ValueError``) when it can't be read.
    """
    return to_rgb(source) if isinstance(source, Image.Image) else decode_image(source)


def to_pixels(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """An RGB image of any shape → ``(3, height, width)`` float32."""
    steps = [(str(name), value) for name, value in settings["steps"]]
    padded = [value for name, value in steps if name == "pad"]
    if padded:
        image = pad_to_square(image, tuple(padded[0]))
    image = enlarge(image)
    for name, value in steps:
        if name == "crop":
            image = crop_middle(image, *value)
        elif name != "pad":
            image = image.resize(new_size(image.size, name, value), Image.Resampling(settings["resample"]))
    values = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    mean, std = (np.asarray(settings[name], dtype=np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    return (values * np.float32(settings["scale"]) - mean) / std


def new_size(size: tuple[int, int], name: str, value: Any) -> tuple[int, int]:
    """``(width, height)`` after a step."""
    width, height = size
    if name == "exact":
        return value[1], value[0]
    if name == "shortest":
        long = int(value * max(size) / min(size))
        return (value, long) if width <= height else (long, value)
    if name == "longest":
        short = int(value / (max(size) / min(size)))
        short = max(short + short % 2, 1)
        return (value, short) if width >= height else (short, value)
    raise ValueError(
        f"device.json: {name!r} is not a step of preparing an image; there are pad, shortest, longest, exact, crop"
    )


def crop_middle(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
