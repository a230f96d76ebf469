"""Pictures whose visual tokens were computed before (`python -m data.cache`): no pixels are read and no encoder is needed."""

from __future__ import annotations

import os
from typing import Any

import torch

from data.media import open_regular, spelled
from data.pictures import Pictures
from data.sample import Media, Reject, Sample
from data.token_store import Damaged, Key, Store, key_of

VISUAL = "visual_tokens"
VISUAL_VIDEO = "visual_tokens_videos"
BLANK = key_of(b"blank")


class CachedPictures:
    """Stands in for `PixelPictures`. An item gets `visual_tokens`: a list of what `Attachment.compress` gave for each picture."""

    def __init__(self, folder: str | os.PathLike[str], frames: int) -> None:
        self.store = Store(folder)
        self.frames = frames

    def __call__(self, sample: Sample) -> Pictures:
        found = Pictures()
        for media in sample.media:
            several = one_of_several(sample, media)
            key, name = self._key(media), str(media.source)[:200] if isinstance(media.source, str) else media.kind
            self._add(found, beside(key) if several and beside(key) in self.store else key, name, several)
        return found

    def blank(self) -> Pictures:
        found = Pictures()
        self._add(found, BLANK, "blank picture", several=False)
        return found

    def _key(self, media: Media) -> Key:
        """By name where the file is the one that was cached or is not here any more, else by content."""
        name = name_of(media)
        known = self.store.named(name) if name is not None else None
        if known is not None and stat_of(media) in (
            known[1:],
            (-1, -1),
        ):  # training machines need not have the pictures
            return known[0]
        return content_key(media, self.frames)

    def _add(self, found: Pictures, key: Key, name: str, several: bool) -> None:
        try:
            entry = self.store.get(key)
        except Damaged as error:
            raise Reject("damaged cache", f"{error}; run python -m data.cache again, which repairs it") from error
        if entry is None:
            raise Reject("not in the cache", f"{name}: run python -m data.cache with this config")
        about, tensors = entry
        if several and about.get("alone"):
            raise Reject(
                "not in the cache", f"{name}, beside other pictures: run python -m data.cache with this config"
            )
        found.placeholders.append(about["placeholder"])
        pictures = unpack(about["pictures"], tensors)
        found.inputs.setdefault(VISUAL_VIDEO if about["video"] else VISUAL, []).extend(pictures)
        for extra in about["extra"]:
            value = tensors[f"extra/{extra}"]
            before = found.inputs.get(extra)
            found.inputs[extra] = value if before is None else torch.cat([before, value])


def one_of_several(sample: Sample, media: Media) -> bool:
    """Whether other pictures stand beside this one in its prompt. A video is none."""
    return media.kind == "image" and sum(other.kind == "image" for other in sample.media) > 1


def beside(key: Key) -> Key:
    """The key of a picture's tokens where it is one of several in its prompt, for a family that encodes it otherwise then."""
    return key_of(b"beside others", *(half.to_bytes(8, "little") for half in key))


def pack(pictures: list[Any], dtype: torch.dtype) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Pictures, each a tensor or several named ones, as flat named tensors; floating ones in `dtype`."""
    shapes: list[Any] = []
    tensors = {}
    for number, picture in enumerate(pictures):
        parts = picture if isinstance(picture, dict) else {"": picture}
        shapes.append(sorted(parts))
        for name, tensor in parts.items():
            tensors[f"{number}/{name}"] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return shapes, tensors


def unpack(shapes: list[Any], tensors: dict[str, torch.Tensor]) -> list[Any]:
    return [
        tensors[f"{number}/"] if names == [""] else {name: tensors[f"{number}/{name}"] for name in names}
        for number, names in enumerate(shapes)
    ]


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
    folder = spelled(media.source) if isinstance(media.source, str) else ""
    if os.path.isdir(folder):
        paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
    else:
        paths = [media.source] if isinstance(media.source, str) else list(media.source)
    contents = []
    for path in paths:
        with open_regular(path) as file:
            contents.append(file.read())
    return key_of(kind, *contents)
