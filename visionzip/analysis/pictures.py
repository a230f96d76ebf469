"""From a path to pictures: one file, a folder of them, or a video. What can't be read is said, never fatal for the others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
#: Pillow's readers that are pure decoders; EPS, say, starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000


@dataclass
class Found:
    """What a path leads to: files by name relative to it, ascending, and why others can't be used."""

    root: Path
    names: list[str]
    skipped: dict[str, str] = field(default_factory=dict)

    def pictures(self) -> Iterator[tuple[str, Image.Image]]:
        """Every readable picture; the others are added to `skipped` with the reason."""
        for name in self.names:
            try:
                yield name, read(self.root / name)
            except ValueError as error:
                self.skipped[name] = str(error)

    def summary(self) -> str:
        """The skipped files in lines for a person; empty when there are none."""
        lines = [f"  {name}: {reason}" for name, reason in sorted(self.skipped.items())]
        return "\n".join([f"skipped {len(lines)} unreadable file(s):", *lines]) if lines else ""


def is_video(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() in VIDEOS


def find(
    path: str | os.PathLike[str], limit: int | None = None, results: str | os.PathLike[str] | None = None
) -> Found:
    """Pictures at `path`: the file itself, or all in a folder and its subfolders whose name ends like a picture's.

    Args:
        limit: at most so many, in the order of their names.
        results: a folder that pictures are written to; those in it are passed over.

    Raises:
        ValueError: where there is nothing, or `results` is `path` itself.
    """
    place = Path(path)
    if place.is_file():
        return Found(place.parent, [place.name])
    if not place.is_dir():
        raise ValueError(f"{path} does not exist; expected a picture, a folder of pictures or a video")
    ours = Path(results).resolve() if results is not None else None
    if ours == place.resolve():
        raise ValueError(f"the results would be written among the pictures in {path}; choose another --out")
    names = sorted(
        found.relative_to(place).as_posix()
        for found in place.rglob("*")
        if found.suffix.lower() in PICTURES
        and not any(part.startswith(".") for part in found.relative_to(place).parts)
        and (ours is None or not found.absolute().is_relative_to(ours))
    )
    if not names:
        raise ValueError(f"there is no picture in {path}; looked for {', '.join(PICTURES)} in it and its subfolders")
    return Found(place, names[:limit])


def read(path: str | os.PathLike[str]) -> Image.Image:
    """An upright RGB picture; transparency on white.

    Raises:
        ValueError: for what is no picture, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    place = Path(path)
    if not place.is_file():
        raise ValueError("not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF and the like; what matters is raised
            with Image.open(place, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} × {image.height} pixels; at most {MAX_PIXELS:,} are read")
                image.load()
                upright = ImageOps.exif_transpose(image) or image
                if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                    layered = upright.convert("RGBA")
                    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
                return upright.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("empty" if place.stat().st_size == 0 else "no picture of a known format") from error
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, …
        raise ValueError(f"damaged picture ({type(error).__name__}: {error})") from error


def read_one(path: str | os.PathLike[str]) -> Image.Image:
    """`read` of a picture that was asked for by name, which its errors say."""
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{path} can't be used: {error}") from error


def frames(path: str | os.PathLike[str], count: int) -> list[Image.Image]:
    """`count` frames, evenly over a video; all of them where it has fewer.

    Raises:
        ValueError: for what is no readable video, or where PyAV is missing.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no video at {path}")
    try:
        import av
    except ImportError as error:
        raise ValueError("reading a video needs PyAV: pip install 'visionzip-ft[video]'") from error
    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            times = sorted({packet.pts for packet in container.demux(stream) if packet.pts is not None})
            wanted = {times[(2 * place + 1) * len(times) // (2 * count)] for place in range(count)}
            container.seek(times[0], stream=stream)
            found = [frame.to_image() for frame in container.decode(stream) if frame.pts in wanted]
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable video ({type(error).__name__}: {error})") from error
    if not found:
        raise ValueError(f"{path} has no frame that can be decoded")
    return found
