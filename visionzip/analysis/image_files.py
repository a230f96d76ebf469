"""From a path to images: one file, or a folder of them. Files that can't be read are listed and do not stop the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from visionzip.images import ImageError, decode_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


@dataclass
class ImageFiles:
    """Files by name relative to `root`, in ascending order, and the reason why some of them can't be used."""

    root: Path
    names: list[str]
    skipped: dict[str, str] = field(default_factory=dict)

    def images(self) -> Iterator[tuple[str, Image.Image]]:
        """Every readable image; the others are added to `skipped` with the reason."""
        for name in self.names:
            try:
                yield name, decode_image(self.root / name)
            except ImageError as error:
                self.skipped[name] = error.words

    def summary(self) -> str:
        """The skipped files as readable lines; empty if there are none."""
        lines = [f"  {name}: {reason}" for name, reason in sorted(self.skipped.items())]
        return "\n".join([f"skipped {len(lines)} unreadable file(s):", *lines]) if lines else ""


def is_video(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() in VIDEOS


def find_images(
    path: str | os.PathLike[str], limit: int | None = None, results: str | os.PathLike[str] | None = None
) -> ImageFiles:
    """Images at `path`: the file itself, or all in a folder and its subfolders whose name ends like an image's.

    Args:
        limit: at most this many, in the order of their names.
        results: the folder that drawings are written to; images in it are ignored.

    Raises:
        ValueError: if there is no image, or `results` is `path` itself.
    """
    place = Path(path)
    if place.is_file():
        return ImageFiles(place.parent, [place.name])
    if not place.is_dir():
        raise ValueError(f"{path} does not exist; expected an image, a folder of images or a video")
    ours = Path(results).resolve() if results is not None else None
    if ours == place.resolve():
        raise ValueError(f"the results would be written among the images in {path}; choose another --out")
    names = sorted(
        found.relative_to(place).as_posix()
        for found in place.rglob("*")
        if found.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in found.relative_to(place).parts)
        and (ours is None or not found.absolute().is_relative_to(ours))
    )
    if not names:
        raise ValueError(f"there is no image in {path}; looked for {', '.join(SUFFIXES)} in it and its subfolders")
    return ImageFiles(place, names[:limit])
