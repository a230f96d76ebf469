"""Decoding images with Pillow alone: what a runtime without torch (`visionzip.device`) and everything else read files with.

Files are not trusted: only the formats listed are tried, only regular files are opened, and the size of an image is checked before
its pixels are decoded. Nothing here fetches anything: a URL, a ``data:`` one included, is the name of a file that does not exist.
"""

from __future__ import annotations

import io
import os
import stat
import unicodedata
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Image.init()  # registers all formats; without it `Image.open(formats=...)` fails on those not used before
# Left out on purpose: formats that start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

MAX_PIXELS = 100_000_000
"""Pixels of the largest image that is decoded, unless the caller sets another limit."""

SMALLEST_SIDE = 8
"""Pixels. Image processors mistake a shorter side for the colour channels; such an image is enlarged to it."""

LARGEST_PADDED_SIDE = 4096
"""Pixels. An image that is padded to a square is scaled down to this first: 30,000 × 200 would become 2.7 GB."""

Colour = tuple[int, int, int]


class ImageError(ValueError):
    """An image or video that can't be used.

    Attributes:
        reason: one of a few short phrases, to count by.
        detail: what was found.
        name: of the file; empty where there is none.
        words: reason and detail, without the name.
    """

    def __init__(self, reason: str, detail: str = "", name: str = "") -> None:
        self.reason, self.detail, self.name = reason, detail, name
        self.words = f"{reason} ({detail})" if detail else reason
        super().__init__(f"{name}: {self.words}" if name else self.words)

    def of(self, name: str) -> ImageError:
        """The same, of the file called `name`."""
        return type(self)(self.reason, self.detail, name)

    def __reduce__(self) -> tuple:  # loader processes hand it on
        return (type(self), (self.reason, self.detail, self.name))


def decode_image(source: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB image, from a file or from the bytes of one.

    The first frame of an animation; transparency on white; 16-bit and floating-point values scaled to 8 bits; EXIF rotation
    applied.

    Raises:
        ImageError: for what is not an image, is damaged, or has more than `max_pixels` pixels.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
    name = f"{len(source)} embedded bytes" if isinstance(source, bytes) else os.fspath(source)
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF and the like; what matters is raised
        if not file.read(1):
            raise ImageError("empty file", name=name)
        file.seek(0)
        try:
            with Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageError(
                        "image too large", f"{width} × {height} pixels, at most {max_pixels:,} are allowed", name
                    )
                image.load()
                return to_rgb(_upright(image))
        except UnidentifiedImageError as error:
            raise ImageError("unreadable image", f"none of {', '.join(FORMATS)}", name) from error
        except Image.DecompressionBombError as error:
            raise ImageError("image too large", str(error), name) from error
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, …
            raise ImageError("unreadable image", f"{type(error).__name__}: {error}", name) from error


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file; never a pipe or device, which could block for ever or have no end. Raises `ImageError`."""
    try:
        path = as_spelled(os.fspath(path))
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError("file missing", "not a file", path)
        return open(path, "rb")
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        detail = getattr(error, "strerror", None) or str(error)
        raise ImageError("file missing", detail, os.fspath(path)) from error


def as_spelled(path: str) -> str:
    """`path` as the file system spells it, where nothing is there under the given name.

    Data sets travel: a record written on Windows separates folders by backslashes, an archive packed on macOS stores `é` as two
    characters where the record has one. Every other name is returned as it is.
    """
    if (path.isascii() and "\\" not in path) or os.path.exists(path):
        return path
    slashes = path.replace("\\", "/")
    others = [slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))]
    return next((other for other in others if os.path.exists(other)), path)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # an EXIF block that can't be read says nothing about the pixels
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, transparency on white."""
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


def pad_to_square(image: Image.Image, colour: Colour) -> Image.Image:
    """The image in the middle of a square of `colour`, as LLaVA-1.5 is trained. What is square already is returned as it is."""
    if max(image.size) > LARGEST_PADDED_SIDE:
        scale = LARGEST_PADDED_SIDE / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def enlarge(image: Image.Image, side: int = SMALLEST_SIDE) -> Image.Image:
    """Enlarge a side that is shorter than `side` pixels to it."""
    if min(image.size) >= side:
        return image
    return image.resize((max(side, image.width), max(side, image.height)), Image.Resampling.NEAREST)
