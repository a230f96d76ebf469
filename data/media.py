"""Reading pictures and videos: whatever comes becomes RGB pictures of a sane size, or a `Reject` that says why not.

Nothing here trusts a file: only the formats listed are tried, only regular files are opened, and a picture's size is looked at
before its pixels are.
"""

from __future__ import annotations

import io
import os
import re
import stat
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.sample import Media, Reject

Image.init()  # registers all formats; without it `Image.open(formats=...)` fails on those not used before
# What instruction data is made of. Left out on purpose: formats that start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

SMALLEST_SIDE = 8
"""Pixels. Below it image processors take a side for the colour channels; such a picture is enlarged to it."""

LARGEST_PADDED_SIDE = 4096
"""Pixels. A picture that is to be padded to a square is scaled down to this first: 30,000 × 200 would become 2.7 GB."""


def native_video(processor: Any) -> bool:
    """Whether the processor takes videos itself; if not, a video is its frames, each a picture."""
    return bool(getattr(processor, "video_token", None)) and getattr(processor, "video_processor", None) is not None


def open_image(source: str | bytes, max_pixels: int) -> Image.Image:
    """An upright RGB picture.

    The first frame of an animation; transparency on white; 16-bit and floating-point values scaled to 8 bits; EXIF rotation
    applied. Raises `Reject` for what can't be read or has more than `max_pixels` pixels.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF and the like; what matters is raised
        if not file.read(1):
            raise Reject("empty file", _name(source))
        file.seek(0)
        try:
            with Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Reject("picture too large", f"{_name(source)}: {width}×{height}, allowed {max_pixels} pixels")
                image.load()
                return _rgb(_upright(image))
        except UnidentifiedImageError as error:
            raise Reject("unreadable picture", f"{_name(source)} is none of {', '.join(FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise Reject("picture too large", f"{_name(source)}: {error}") from error
        except Reject:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, …
            raise Reject("unreadable picture", f"{_name(source)}: {type(error).__name__}: {error}") from error


def spelled(path: str) -> str:
    """`path` as the file system spells it, where nothing is there under the given name.

    Data sets travel: a record written on Windows separates folders by backslashes, an archive packed on macOS stores `é` as two
    characters where the record has one. Every other name is returned as it is.
    """
    if (path.isascii() and "\\" not in path) or os.path.exists(path):
        return path
    slashes = path.replace("\\", "/")
    others = [slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))]
    return next((other for other in others if os.path.exists(other)), path)


def open_regular(path: str) -> io.BufferedReader:
    """Open a regular file; never a pipe or device, which could block for ever or have no end."""
    try:
        path = spelled(path)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Reject("file missing", f"{path} is not a file")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise Reject("file missing", f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _name(source: str | bytes) -> str:
    return source if isinstance(source, str) else f"{len(source)} embedded bytes"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # an EXIF block that can't be read says nothing about the pixels
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, which Pillow's own conversion would clip to white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        values = values / 257  # 65535 → 255
    elif low >= 0 and high <= 1 and image.mode == "F":
        values = values * 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low))
    return Image.fromarray(values.round().astype(np.uint8))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of `colour`, as LLaVA-1.5 is trained."""
    if max(image.size) > LARGEST_PADDED_SIDE:
        scale = LARGEST_PADDED_SIDE / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def at_least(image: Image.Image, side: int = SMALLEST_SIDE) -> Image.Image:
    """Enlarge a side that is shorter than `side` pixels to it."""
    if min(image.size) >= side:
        return image
    return image.resize((max(side, image.width), max(side, image.height)), Image.Resampling.NEAREST)


def read_frames(media: Media, count: int, max_pixels: int) -> list[Image.Image]:
    """`count` RGB frames of a video (fewer where it has fewer), uniformly over its length.

    A video is a file, the bytes of one, a folder of frames, or a list of frame files. Raises `Reject`.
    """
    if isinstance(media.source, list):
        return _frame_files(media.source, count, max_pixels)
    folder = spelled(media.source) if isinstance(media.source, str) and "\0" not in media.source else None
    if folder is not None and os.path.isdir(folder):
        names = [name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES)]
        files = [os.path.join(folder, name) for name in sorted(names, key=_natural)]
        if not files:
            raise Reject("unreadable video", f"{folder} holds no frames ({', '.join(FRAME_SUFFIXES)})")
        return _frame_files(files, count, max_pixels)
    from data.video import decode_frames  # here: PyAV is needed by nobody who has no video files

    return decode_frames(media.source, count, max_pixels)


def _frame_files(files: Sequence[str], count: int, max_pixels: int) -> list[Image.Image]:
    return [open_image(files[index], max_pixels) for index in uniform(len(files), count)]


def _natural(name: str) -> list[Any]:
    """Order `frame_2` before `frame_10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def uniform(total: int, count: int) -> list[int]:
    """`count` indices from the first to the last of `total`, evenly spaced; all of them where there are no more."""
    if total <= count:
        return list(range(total))
    return [int(index) for index in np.linspace(0, total - 1, count).round()]
