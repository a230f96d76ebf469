"""Compute the compressed visual tokens of every picture of a config once; every epoch, run and rank then reads them.

python -m data.cache --config configs/llava-1.5-7b/ft-64.yaml data.cache=/data/tokens-64            one process
torchrun --nproc_per_node 8 -m data.cache --config ... data.cache=...                                 one for each GPU

Selection does not look at the text, so tokens are a function of the picture, the encoder and the ZipConfig. The folder says in
`cache.json` which; a run with others is refused. Interrupted or damaged, the same command goes on or repairs.
Several nodes write into one shared folder, or each into its own, whose shards are then copied together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data.cached_pictures import BLANK, beside, content_key, name_of, one_of_several, pack, stat_of
from data.collate import merge_pictures
from data.config import DataConfig, load_config
from data.dataset import build_dataset
from data.partial import load_without
from data.pictures import Pictures, PixelPictures
from data.processes import own_device, rank_and_world
from data.sample import Media, Reject, Rejection, Sample
from data.token_store import SHARD_BYTES, Damaged, Key, Store, Writer, key_of
from visionzip import Attachment, ZipConfig, attach, attached
from visionzip.families import family_for
from visionzip.fingerprint import differences, fingerprint

MANIFEST = "cache.json"
FORMAT = "visionzip-tokens/1"


class CacheError(ValueError):
    """The cache is not there, or was made with something else; the message says with what."""


def identity(model: Any, processor: Any, zip_config: ZipConfig, data: DataConfig, dtype: str) -> dict[str, Any]:
    """Everything that the cached tokens depend on but the pictures themselves. `model` is attached; its LLM is not needed."""
    pictures = PixelPictures(data, processor)
    image = processor.image_processor
    settings = {
        key: value
        for key, value in json.loads(image.to_json_string()).items()
        if key not in ("processor_class", "name_or_path")
    }
    return {
        "format": FORMAT,
        "encoder": fingerprint(model, {"encoder": family_for(model).frozen["encoder"]}),
        "zip": zip_config.model_dump(exclude={"pad_images"}),  # what it comes to stands below
        "preprocessing": {
            "image_processor": type(image).__name__,
            **settings,
            "pad_to_square": list(pictures.colour) if pictures.pad else False,
            "frames": data.frames,
        },
        "dtype": dtype,
    }


def check_identity(folder: str | os.PathLike[str], wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a cache, if it was made with what is `wanted`.

    Raises:
        CacheError: no cache there, or what differs, by name.
    """
    path = Path(folder) / MANIFEST
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError(
            f"{folder} holds no token cache ({MANIFEST} is missing); make it: python -m data.cache --config ..."
        ) from None
    except ValueError as error:
        raise CacheError(f"{path} is damaged ({error}); delete the folder and make the cache again") from None
    found = (
        []
        if stored.get("format") == wanted["format"]
        else [f"format: {stored.get('format')} there, {wanted['format']} here"]
    )
    if not found:
        found += differences(wanted["encoder"], stored["encoder"])
        for section in ("zip", "preprocessing"):
            keys = sorted(stored[section].keys() | wanted[section].keys())
            found += [
                f"{section}.{key}: {stored[section].get(key)} there, {wanted[section].get(key)} here"
                for key in keys
                if stored[section].get(key) != wanted[section].get(key)
            ]
        if stored["dtype"] != wanted["dtype"]:
            found.append(f"dtype: {stored['dtype']} there, {wanted['dtype']} here")
    if found:
        raise CacheError(
            f"the token cache {folder} was made with something else: {'; '.join(found)}. Set data.cache to another folder, or delete this one"
        )
    return stored


def claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Write the manifest if nobody has, else compare. Any number of processes may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{MANIFEST}.{os.uname().nodename}.{os.getpid()}"
    aside.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    try:
        os.link(aside, folder / MANIFEST)  # fails where it exists, unlike a rename
    except FileExistsError:
        check_identity(folder, wanted)
    except OSError:  # a file system without hard links
        if not (folder / MANIFEST).exists():
            os.replace(aside, folder / MANIFEST)
        check_identity(folder, wanted)
    finally:
        aside.unlink(missing_ok=True)


def all_media(
    config: DataConfig, processor: Any, process: int, processes: int, alone_differs: bool = False
) -> tuple[list[tuple[int, int]], list[Rejection]]:
    """(record, number of its media) of every distinct media of this process's share, and records that can't be read.

    Shares are cut by a hash of the name, so that a picture of many records is in one share. With `alone_differs`, a media that
    is somewhere alone and somewhere one of several is distinct from itself.
    """
    dataset = build_dataset(config, processor, 0, pictures=_NoPictures())
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


class _NoPictures:
    """For listing: nothing is opened."""

    def __call__(self, sample: Sample) -> Pictures:
        return Pictures()

    def blank(self) -> Pictures:
        return Pictures()


@dataclass
class Item:
    """A media of a record.

    Attributes:
        content: key of its bytes.
        key: key of its entry: `content`, or where it is one of several in its prompt and that matters, `beside(content)`.
        pictures: ready for the encoder; None where the cache has them already.
        copies: how often it is in there.
    """

    media: Media
    content: Key
    key: Key
    pictures: Pictures | None = None
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
        self.records = build_dataset(config, processor, 0, pictures=_NoPictures())
        self.pictures = PixelPictures(config, processor)
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
                # Twice the same picture: any other one beside it would do.
                item.pictures = self.pictures(Sample(sample.id, [], [media, media] if several else [media]))
                item.copies = 1 + several
            return item
        except Reject as error:
            return Rejection(sample.id, sample.source, index, error.reason, error.detail)

    def _cached(self, key: Key) -> bool:
        """Whether the entry is there and whole."""
        try:
            return self.store.get(key) is not None
        except Damaged as error:
            print(f"{error}; computing it again", file=sys.stderr)
            return False


class Builder:
    """Encodes, compresses and writes."""

    def __init__(self, attachment: Attachment, writer: Writer, device: torch.device, dtype: torch.dtype) -> None:
        self.attachment, self.writer, self.device, self.dtype = attachment, writer, device, dtype
        self.written: set[Key] = set()
        self.read = self.reused = 0

    def add(self, items: list[Item]) -> None:
        """One batch of `MediaDataset`'s items, rejections left out."""
        fresh = list(
            {item.key: item for item in items if item.pictures is not None and item.key not in self.written}.values()
        )
        ready = [(item, item.pictures) for item in fresh if item.pictures is not None]
        counted = self.attachment.family.count_images
        single = [(item, pictures) for item, pictures in ready if counted(pictures.inputs) == 1]
        if single:
            for (item, pictures), tokens in zip(single, self._compress([p for _, p in single]), strict=True):
                self._write(item.key, pictures, [tokens])
        for item, pictures in ready:
            if counted(pictures.inputs) != 1:  # the frames of a video, a picture each; copies
                tokens = self._compress([pictures])
                self._write(item.key, pictures, tokens[: len(tokens) // item.copies], alone=item.copies == 1)
        for item in items:
            name = name_of(item.media)
            if name is not None:
                self.writer.name(name, item.content, *stat_of(item.media))
        self.read += len(items)
        self.reused += len(items) - len(fresh)

    def add_blank(self, pictures: Pictures) -> None:
        self._write(BLANK, pictures, self._compress([pictures]))

    def _compress(self, pictures: list[Pictures]) -> list[Any]:
        merged = merge_pictures([each.inputs for each in pictures])
        inputs = {
            key: value.to(self.device) if torch.is_tensor(value) else value  # encoders cast pixels to their own dtype
            for key, value in merged.items()
        }
        return self.attachment.compress(**inputs)

    def _write(self, key: Key, pictures: Pictures, tokens: list[Any], alone: bool = True) -> None:
        shapes, tensors = pack(tokens, self.dtype)
        extra = {
            name: value
            for name, value in pictures.inputs.items()
            if torch.is_tensor(value) and not name.startswith("pixel_")
        }
        tensors |= {f"extra/{name}": value for name, value in extra.items() if value.numel() <= 64}
        about = {
            "pictures": shapes,
            "placeholder": self.attachment.placeholders(pictures.placeholders[0], tokens),
            "video": "pixel_values_videos" in pictures.inputs,
            "alone": alone and self.attachment.family.alone_differs,
            "extra": [name for name in extra if f"extra/{name}" in tensors],
        }
        self.writer.add(key, about, {name: tensor.cpu() for name, tensor in tensors.items()})
        self.written.add(key)


def fill(
    folder: Path, attachment: Any, processor: Any, config: DataConfig, *, process: int = 0, processes: int = 1, device: torch.device,
    dtype: torch.dtype, batch: int = 64, workers: int = 4, shard_bytes: int = SHARD_BYTES, progress: bool = False,
) -> tuple[Builder, list[Rejection]]:  # fmt: skip
    """This process's share of the cache."""
    differs = attachment.family.alone_differs
    places, rejected = all_media(config, processor, process, processes, differs)
    store = Store(folder)
    dataset = MediaDataset(config, processor, places, store, differs)
    loader = DataLoader(
        dataset, batch_size=batch, num_workers=min(workers, max(1, len(places) // batch)), collate_fn=list
    )
    writer = Writer(folder, shard_bytes)
    builder = Builder(attachment, writer, device, dtype)
    try:
        if BLANK not in store and process == 0:
            builder.add_blank(dataset.pictures.blank())
        for items in _shown(loader, progress):
            rejected += [item for item in items if isinstance(item, Rejection)]
            builder.add([item for item in items if not isinstance(item, Rejection)])
        writer.close()
    except BaseException:
        writer.close()  # what is computed is computed: the next start goes on from here
        raise
    Store(folder)  # make the index now, once, rather than when many ranks start
    return builder, rejected


def _shown(loader: Any, progress: bool) -> Iterator[Any]:
    if not progress:
        yield from loader
        return
    from tqdm import tqdm

    yield from tqdm(
        loader, desc="compressing", unit="batch", dynamic_ncols=True, mininterval=1.0 if sys.stderr.isatty() else 10.0
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help="the run's YAML file; its sections model, zip and data are read"
    )
    parser.add_argument("--batch", type=int, default=64, help="pictures through the encoder at once")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(argv)
    try:
        return run(given.config, given.overrides, given.batch, given.workers)
    except (CacheError, FileNotFoundError, ValueError) as error:
        print(f"data.cache: {error}", file=sys.stderr)
        return 2


def run(path: str, overrides: list[str], batch: int, workers: int) -> int:
    from transformers import AutoProcessor

    config = load_config(path, overrides)
    data, zip_config, section = config.data, config.zip, config.model
    if not data.cache:
        raise CacheError(f"{path} does not say where the cache is to be; add data.cache=FOLDER")
    process, processes = rank_and_world()
    device = own_device()
    dtype = section.dtype
    start = time.perf_counter()
    model = load_without(section.path, ["llm"], dtype=getattr(torch, dtype), **section.source_options)
    processor = AutoProcessor.from_pretrained(section.path, **section.source_options)
    attachment = attached(attach(model.to(device).eval(), processor, zip_config))
    folder = Path(data.cache)
    claim(folder, identity(model, processor, zip_config, data, dtype))
    builder, rejected = fill(
        folder, attachment, processor, data, process=process, processes=processes, device=device, dtype=getattr(torch, dtype),
        batch=batch, workers=workers, progress=process == 0,
    )  # fmt: skip
    if rejected:
        listed = folder / f"rejected-{process}.jsonl"
        listed.write_text("".join(json.dumps(item.as_dict()) + "\n" for item in rejected), encoding="utf-8")
        print(
            f"data.cache: {len(rejected)} of this process's pictures or records can't be used; see {listed}",
            file=sys.stderr,
        )
    seconds = time.perf_counter() - start
    print(
        f"process {process} of {processes}: {builder.read} pictures, {len(builder.written)} computed, {builder.reused} there already, "
        f"{seconds:.1f} s; the cache holds {len(Store(folder))} entries in {sum(p.stat().st_size for p in folder.glob('*.tokens')) / 1e9:.2f} GB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
