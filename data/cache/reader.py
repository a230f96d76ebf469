"""Images whose visual tokens were computed before (`python -m data.cache`): no pixels are read and no encoder is needed."""

from __future__ import annotations

import os
from typing import Any

import torch

from data.cache.budgets import count_tokens, smallest, tokens_at
from data.cache.identity import cache_at
from data.cache.keys import BLANK, beside, content_key, name_of, one_of_several, stat_of
from data.cache.shards import Damaged, Key
from data.cache.store import Store
from data.elastic import Budget
from data.sample import Media, Reject, Sample
from visionzip.inputs import ImageInputs

VISUAL = "visual_tokens"
VISUAL_VIDEO = "visual_tokens_videos"


class CachedTokens:
    """Stands in for `PixelImages`. An item gets `visual_tokens`: a list of what `Attachment.compress` gave for each image.

    Args:
        budget: of a cache for several budgets, the one that is read for a sample that names none; None: the smallest.
    """

    def __init__(self, folder: str | os.PathLike[str], frames: int, budget: Budget | None = None) -> None:
        self.store = Store(folder, cache_at(folder))
        self.frames, self.budget = frames, budget

    def __call__(self, sample: Sample) -> ImageInputs:
        found = ImageInputs()
        for media in sample.media:
            several = one_of_several(sample, media)
            key, name = self._key(media), str(media.source)[:200] if isinstance(media.source, str) else media.kind
            key = beside(key) if several and beside(key) in self.store else key
            self._add(found, key, name, several, sample.budget or self.budget)
        return found

    def blank(self) -> ImageInputs:
        found = ImageInputs()
        self._add(found, BLANK, "blank image", several=False, budget=self.budget)
        return found

    def _key(self, media: Media) -> Key:
        """By name where the file is the one that was cached or is not here any more, else by content."""
        name = name_of(media)
        known = self.store.named(name) if name is not None else None
        if known is not None and stat_of(media) in (
            known[1:],
            (-1, -1),
        ):  # training machines need not have the images
            return known[0]
        return content_key(media, self.frames)

    def _add(self, found: ImageInputs, key: Key, name: str, several: bool, budget: Budget | None) -> None:
        try:
            entry = self.store.get(key)
        except Damaged as error:
            raise Reject("damaged cache", f"{error}; run visionzip cache again to repair it") from error
        if entry is None:
            raise Reject("not in the cache", f"{name}: run visionzip cache with this config")
        about, tensors = entry
        if several and about.get("alone"):
            raise Reject("not in the cache", f"{name}, beside other images: run visionzip cache with this config")
        images = unpack(about["pictures"], tensors)
        if each := about.get("ladder"):
            images = [tokens_at(image, each, budget or smallest(each)) for image in images]
        found.placeholders.append(each["token"] * count_tokens(images) if each else about["placeholder"])
        found.inputs.setdefault(VISUAL_VIDEO if about["video"] else VISUAL, []).extend(images)
        for extra in about["extra"]:
            value = tensors[f"extra/{extra}"]
            before = found.inputs.get(extra)
            found.inputs[extra] = value if before is None else torch.cat([before, value])


def pack(images: list[Any], dtype: torch.dtype) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Images, each a tensor or several named ones, as flat named tensors; floating ones in `dtype`."""
    shapes: list[Any] = []
    tensors = {}
    for number, image in enumerate(images):
        parts = image if isinstance(image, dict) else {"": image}
        shapes.append(sorted(parts))
        for name, tensor in parts.items():
            tensors[f"{number}/{name}"] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return shapes, tensors


def unpack(shapes: list[Any], tensors: dict[str, torch.Tensor]) -> list[Any]:
    return [
        tensors[f"{number}/"] if names == [""] else {name: tensors[f"{number}/{name}"] for name in names}
        for number, names in enumerate(shapes)
    ]
