"""Sources read as they come, without a local copy and without a length.

Every consumer (a worker of a rank) takes its own share of the records: whole files where there are enough of them, else every
n-th record. The stream has no end: pass follows pass, so no rank is ever done before another. A run over it is measured in steps.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from data.collate import Collator
from data.config import DataConfig, SourceConfig
from data.dataset import Encoder, as_rejection, at_budgets, guarded_parse, single_threaded_tokenizers
from data.elastic import Budget, BudgetDraw
from data.formats.common import RecordSource
from data.images import LoadImages
from data.records import image_root, open_records, reader_of
from data.sample import Rejection, Sample

SHUFFLE = 1000
"""Records held to draw from, a consumer and source: undecoded, so images are there as files' bytes."""


Read = Callable[[], Any]
"""Gives a record, or raises `Reject`."""


class StreamSource:
    """One source of a stream. A JSON file can be among them; it is read in place, like everywhere."""

    def __init__(self, config: SourceConfig, cache_dir: str | None) -> None:
        if config.fraction != 1:
            raise ValueError(
                f"data source {config.label!r}: a stream has no known length to take fraction={config.fraction} of; "
                "set max_samples, or streaming: false for all sources"
            )
        self.label, self.weight, self.max_samples = config.label, config.weight, config.max_samples
        self.layout = RecordSource(self.label, config.format, image_root(config), config.columns)
        self.dataset: Any = None
        if reader_of(config) == "json":
            self.stored = open_records(config, cache_dir)
        else:
            from data.hf import load_source

            self.dataset = load_source(config, streaming=True).with_format("arrow")

    def records(self, consumer: int, consumers: int) -> Iterator[tuple[int, Read]]:
        """One pass over this consumer's share: (a number no other record has, how to read the record)."""
        if self.dataset is None:
            count = min(len(self.stored), self.max_samples or len(self.stored))
            for number in range(consumer, count, consumers):
                yield number, partial(self.stored.__getitem__, number)
        elif self.max_samples is None and self.dataset.num_shards >= consumers:
            share = self.dataset.shard(num_shards=consumers, index=consumer)
            yield from ((number * consumers + consumer, read) for number, read in enumerate(rows(share)))
        else:
            first = islice(enumerate(rows(self.dataset)), self.max_samples)
            yield from islice(first, consumer, None, consumers)


def rows(dataset: Any) -> Iterator[Read]:
    # Not `for row in dataset`: in a worker that would split what was split already, and lose records.
    for table in dataset.iter(batch_size=16):
        for row in table.to_pylist():
            yield partial(_same, row)


def _same(record: Any) -> Any:
    return record


class StreamedDataset(IterableDataset):
    """An endless stream of items and `Rejection`s, mixed by weight.

    `rank` and `world_size` say whose stream this is; the workers of a DataLoader share it among them. With `draw` each sample has
    a budget, which its place in its consumer's stream decides.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Any,
        seed: int,
        images: LoadImages | None = None,
        rank: int = 0,
        world_size: int = 1,
        draw: BudgetDraw | None = None,
    ) -> None:
        self.draw = draw
        self.config, self.seed, self.rank, self.world_size = config, seed, rank, world_size
        self.sources = [StreamSource(source, config.cache_dir) for source in config.sources]
        self.encoder = Encoder(config, processor, images)
        self._make: Callable[[Sample], Any] = self.encoder
        self.batches, self.batch_size = 0, 1

    def with_transform(self, make: Callable[[Sample], Any]) -> StreamedDataset:
        """The same stream, `make` called for each sample in place of the encoder."""
        other = copy.copy(self)
        other._make = make
        return other

    def skip_batches(self, batches: int, batch_size: int) -> None:
        """Begin after the first `batches` batches of a DataLoader: their records are read but not decoded."""
        self.batches, self.batch_size = batches, batch_size

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        # The loader takes a batch of each worker in turn, and begins with its first again when a run is resumed.
        worker = ((info.id if info else 0) + self.batches) % workers
        skip = -(-(self.batches - worker) // workers) * self.batch_size if self.batches > worker else 0
        consumer, consumers = self.rank * workers + worker, self.world_size * workers
        for place, (source, number, read) in enumerate(
            islice(self._mixed(consumer, consumers), skip, None), start=skip
        ):
            sample = guarded_parse(read, source.layout, number)
            if isinstance(sample, Rejection):
                yield sample
            elif self.draw is None:
                yield self._item(source, number, sample)
            else:
                yield self._at_budgets(source, number, sample, self.draw(consumer, place, 1)[0])

    def collator(self) -> Collator:
        return Collator(self.encoder.processor, self.encoder.images)

    def _item(self, source: StreamSource, number: int, sample: Sample) -> dict[str, Any] | Rejection:
        try:
            return self._make(sample)
        except Exception as error:
            return as_rejection(error, sample.id, source.label, number)

    def _at_budgets(self, source: StreamSource, number: int, sample: Sample, budgets: tuple[Budget, ...]) -> Any:
        return at_budgets(lambda sample: self._item(source, number, sample), sample, budgets)

    def _mixed(self, consumer: int, consumers: int) -> Iterator[tuple[StreamSource, int, Read]]:
        """Draw a source by weight, then its next record; a source this consumer has nothing of is left out."""
        draw = random.Random(f"{self.seed} {consumer}")
        streams = {source: self._endless(source, consumer, consumers) for source in self.sources}
        while streams:
            source = draw.choices(list(streams), [source.weight for source in streams])[0]
            found = next(streams[source], None)
            if found is None:
                del streams[source]
            else:
                yield source, *found

    def _endless(self, source: StreamSource, consumer: int, consumers: int) -> Iterator[tuple[int, Read]]:
        epoch = 0
        while True:
            found = False
            for item in shuffled(source.records(consumer, consumers), random.Random(f"{self.seed} {epoch} {consumer}")):
                found = True
                yield item
            if not found:
                return
            epoch += 1


def shuffled(items: Iterator[Any], draw: random.Random) -> Iterator[Any]:
    """Shuffle through a buffer of `SHUFFLE` items: each comes once."""
    held = list(islice(items, SHUFFLE))
    for item in items:
        place = draw.randrange(len(held))
        held[place], item = item, held[place]
        yield item
    draw.shuffle(held)
    yield from held


def is_streamed(config: DataConfig) -> bool:
    """One streamed source makes a stream of all: the others are then read in their order, too."""
    return any(source.streaming for source in config.sources)


def build_stream(
    config: DataConfig,
    processor: Any,
    seed: int,
    rank: int,
    world_size: int,
    images: LoadImages | None = None,
    draw: BudgetDraw | None = None,
) -> StreamedDataset:
    """The endless data set of a config with streamed sources. See `build_dataset`."""
    single_threaded_tokenizers()
    return StreamedDataset(config, processor, seed, images, rank, world_size, draw)
