"""Which images and videos a config has, each once, and reading them for the encoder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from data.cache.keys import beside, content_key, name_of, one_of_several
from data.cache.shards import Damaged, Key, key_of
from data.cache.store import Store
from data.config import DataConfig
from data.dataset import InstructionDataset, build_dataset
from data.images import PixelImages
from data.sample import Media, Reject, Rejection, Sample
from visionzip.inputs import ImageInputs


def list_media(
    config: DataConfig, processor: Any, process: int, processes: int, alone_differs: bool = False
) -> tuple[list[tuple[int, int]], list[Rejection]]:
    """(record, number of its media) of every distinct media of this process's share, and records that can't be read.

    Shares are cut by a hash of the name, so that an image of many records is in one share. With `alone_differs`, a media that
    is somewhere alone and somewhere one of several is distinct from itself.
    """
    dataset = open_listing(config, processor)
    seen: set[tuple[Key, bool]] = set()
    found, rejected = [], []
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        if isinstance(sample, Rejection):
            if index % processes == process:
                rejected.append(sample)
            continue
        for number, media in enumerate(sample.media):
            name = name_of(media) or key_of(media.source if isinstance(media.source, bytes) else b"")
            distinct = name, alone_differs and one_of_several(sample, media)
            if name[0] % processes == process and distinct not in seen:
                seen.add(distinct)
                found.append((index, number))
    return found, rejected


def open_listing(config: DataConfig, processor: Any) -> InstructionDataset:
    """The config's records, whose `sample`s name their images; no image is ever opened."""
    return build_dataset(config, processor, 0, images=_NoImages())


class _NoImages:
    """For listing: nothing is opened."""

    def __call__(self, sample: Sample) -> ImageInputs:
        return ImageInputs()

    def blank(self) -> ImageInputs:
        return ImageInputs()


@dataclass
class Item:
    """A media of a record.

    Attributes:
        content: key of its bytes.
        key: key of its entry: `content`, or where it is one of several in its prompt and that matters, `beside(content)`.
        images: ready for the encoder; None where the cache has them already.
        copies: how often it is in there.
    """

    media: Media
    content: Key
    key: Key
    images: ImageInputs | None = None
    copies: int = 1


class MediaDataset(Dataset):
    """Media → `Item` or a `Rejection`. `alone_differs`: see `visionzip.families.base.Family`."""

    def __init__(
        self,
        config: DataConfig,
        processor: Any,
        places: list[tuple[int, int]],
        store: Store,
        alone_differs: bool = False,
    ) -> None:
        self.records = open_listing(config, processor)
        self.images = PixelImages(config, processor)
        self.places, self.store, self.frames, self.alone_differs = places, store, config.frames, alone_differs

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Item | Rejection:
        index, number = self.places[place]
        sample = self.records.sample(index)
        assert not isinstance(sample, Rejection)
        media = sample.media[number]
        try:
            content = content_key(media, self.frames)
            several = self.alone_differs and one_of_several(sample, media)
            item = Item(media, content, beside(content) if several else content)
            if not self._cached(item.key):
                # Twice the same image: any other one beside it would do.
                item.images = self.images(Sample(sample.id, [], [media, media] if several else [media]))
                item.copies = 1 + several
            return item
        except Reject as error:
            return Rejection(sample.id, sample.source, index, error.reason, error.detail)

    def _cached(self, key: Key) -> bool:
        """Whether the entry is there and whole."""
        try:
            return self.store.get(key) is not None
        except Damaged as error:
            print(f"{error}; recomputing it", file=sys.stderr)
            return False
