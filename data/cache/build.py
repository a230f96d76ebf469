"""Encode, compress, write: this process's share of a token cache."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from data.cache.budgets import CompressToEach, tokens_at
from data.cache.identity import CacheError, cache_at, claim, identity
from data.cache.keys import BLANK, name_of, stat_of
from data.cache.media import Item, MediaDataset, list_media, open_listing
from data.cache.reader import pack
from data.cache.shards import SHARD_BYTES, SUFFIX, Key, Writer
from data.cache.store import Store
from data.collate import merge_images
from data.config import DataConfig, PipelineConfig
from data.partial import as_config_error, load_processor, load_without
from data.processes import own_device, rank_and_world
from data.sample import Rejection
from visionzip import Attachment, attach, attached
from visionzip.inputs import ImageInputs
from visionzip.words import count_of


class Builder:
    """Encodes, compresses and writes."""

    def __init__(self, attachment: Attachment, writer: Writer, device: torch.device, dtype: torch.dtype) -> None:
        self.attachment, self.writer, self.device, self.dtype = attachment, writer, device, dtype
        self.each = CompressToEach(attachment) if attachment.config.budgets is not None else None
        self.written: set[Key] = set()
        self.read = self.reused = 0
        self.bytes = self.bytes_of_largest = 0

    def add(self, items: list[Item]) -> None:
        """One batch of `MediaDataset`'s items, rejections left out."""
        fresh = list(
            {item.key: item for item in items if item.images is not None and item.key not in self.written}.values()
        )
        ready = [(item, item.images) for item in fresh if item.images is not None]
        counted = self.attachment.family.count_images
        single = [(item, images) for item, images in ready if counted(images.inputs) == 1]
        if single:
            for (item, images), tokens in zip(single, self._compress([p for _, p in single]), strict=True):
                self._write(item.key, images, [tokens])
        for item, images in ready:
            if counted(images.inputs) != 1:  # the frames of a video, an image each; copies
                tokens = self._compress([images])
                self._write(item.key, images, tokens[: len(tokens) // item.copies], alone=item.copies == 1)
        for item in items:
            name = name_of(item.media)
            if name is not None:
                self.writer.name(name, item.content, *stat_of(item.media))
        self.read += len(items)
        self.reused += len(items) - len(fresh)

    def add_blank(self, images: ImageInputs) -> None:
        self._write(BLANK, images, self._compress([images]))

    def _compress(self, images: list[ImageInputs]) -> list[Any]:
        merged = merge_images([each.inputs for each in images])
        inputs: dict[str, Any] = {
            key: value.to(self.device) if torch.is_tensor(value) else value  # encoders cast pixels to their own dtype
            for key, value in merged.items()
        }
        return self.attachment.compress(**inputs) if self.each is None else self.each(**inputs)

    def _write(self, key: Key, images: ImageInputs, tokens: list[Any], alone: bool = True) -> None:
        shapes, tensors = pack(tokens, self.dtype)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        extra = {
            name: value
            for name, value in images.inputs.items()
            if torch.is_tensor(value) and not name.startswith("pixel_")
        }
        tensors |= {f"extra/{name}": value for name, value in extra.items() if value.numel() <= 64}
        about: dict[str, Any] = {
            "pictures": shapes,
            "video": "pixel_values_videos" in images.inputs,
            "alone": alone and self.attachment.family.alone_differs,
            "extra": [name for name in extra if f"extra/{name}" in tensors],
        }
        if self.each is None:
            about["placeholder"] = images.placeholders[0]
        else:
            about["ladder"] = self.each.describe(self.attachment.processor.image_token)
            largest = [tokens_at(image, about["ladder"], self.each.budgets[-1]) for image in tokens]
            self.bytes_of_largest += sum(tensor.nbytes for tensor in pack(largest, self.dtype)[1].values())
        self.writer.add(key, about, {name: tensor.cpu() for name, tensor in tensors.items()})
        self.written.add(key)


def fill(
    folder: Path, attachment: Any, processor: Any, config: DataConfig, *, process: int = 0, processes: int = 1, device: torch.device,
    dtype: torch.dtype, batch: int = 64, workers: int = 4, shard_bytes: int = SHARD_BYTES, progress: bool = False,
) -> tuple[Builder, list[Rejection]]:  # fmt: skip
    """This process's share of the cache."""
    differs = attachment.family.alone_differs
    places, rejected = list_media(config, processor, process, processes, differs)
    cache = cache_at(folder)
    store = Store(folder, cache)
    dataset = MediaDataset(config, processor, places, store, differs)
    loader = DataLoader(
        dataset, batch_size=batch, num_workers=min(workers, max(1, len(places) // batch)), collate_fn=list
    )
    writer = Writer(folder, cache, shard_bytes)
    builder = Builder(attachment, writer, device, dtype)
    try:
        if BLANK not in store and process == 0:
            builder.add_blank(dataset.images.blank())
        for items in _shown(loader, progress):
            rejected += [item for item in items if isinstance(item, Rejection)]
            builder.add([item for item in items if not isinstance(item, Rejection)])
    except OSError:
        writer.abandon()
        raise
    except BaseException:
        writer.close()  # what is computed is computed: the next start goes on from here
        raise
    writer.close()
    Store(folder, cache)  # make the index now, once, rather than when many ranks start
    return builder, rejected


def _shown(loader: Any, progress: bool) -> Iterator[Any]:
    if not progress:
        yield from loader
        return
    from tqdm import tqdm

    yield from tqdm(
        loader, desc="compressing", unit="batch", dynamic_ncols=True, mininterval=1.0 if sys.stderr.isatty() else 10.0
    )


def build_cache(config: PipelineConfig, batch: int = 64, workers: int = 4) -> None:
    """This process's share of the cache that `config` names, and a line on the terminal about it.

    Args:
        batch: images encoded at once.
        workers: processes that read images.

    Raises:
        CacheError: no folder is named, or it is another cache's.
        ConfigError: the model can't be loaded or compressed.
        ValueError, OSError: for a source that can't be opened, a disk that is full.
    """
    data, section = config.data, config.model
    if not data.cache:
        raise CacheError("data.cache is not set; add data.cache=FOLDER")
    folder, dtype = Path(data.cache), getattr(torch, section.dtype)
    process, processes = rank_and_world()
    device = own_device()
    start = time.perf_counter()
    processor = load_processor(section)
    folder.mkdir(parents=True, exist_ok=True)  # what can go wrong at once does so before weights are read
    open_listing(data, processor)
    with as_config_error("model / zip"):
        model = load_without(section.path, ["llm"], dtype=dtype, **section.source_options)
        attachment = attached(attach(model.to(device).eval(), processor, config.zip))
    assert attachment is not None
    if config.zip.budgets is not None:
        CompressToEach(attachment)  # what it refuses leaves no folder behind
    claim(folder, identity(model, processor, config.zip, data, section.dtype))
    builder, rejected = fill(
        folder, attachment, processor, data, process=process, processes=processes, device=device, dtype=dtype,
        batch=batch, workers=workers, progress=process == 0,
    )  # fmt: skip
    list_rejected(folder / f"rejected-{process}.jsonl", rejected)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}")) / 1e9
    print(
        f"process {process} of {processes}: {count_of(builder.read, 'image')}, {len(builder.written)} computed, {builder.reused} there already, "
        f"{seconds:.1f} s; the cache holds {len(Store(folder, cache_at(folder)))} entries in {size:.2f} GB"
    )
    if builder.each is not None and builder.written:
        print(
            f"{count_of(len(builder.each.budgets), 'budget')}: {builder.bytes / len(builder.written):,.0f} bytes per image, "
            f"{builder.bytes / builder.bytes_of_largest:.2f} times those of the largest budget alone"
        )


def list_rejected(path: Path, rejected: list[Rejection]) -> None:
    """Write the records and images that can't be used, and say so; a list of an earlier start is replaced."""
    if not rejected:
        path.unlink(missing_ok=True)
        return
    path.write_text("".join(json.dumps(item.as_dict()) + "\n" for item in rejected), encoding="utf-8")
    print(f"{len(rejected)} of this process's images or records can't be used; see {path}", file=sys.stderr)
