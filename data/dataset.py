"""Records → items. The one place where a record is read, and where nothing it does wrong gets past."""

from __future__ import annotations

import bisect
import copy
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch.utils.data import Dataset

from data.cache.reader import CachedTokens
from data.collate import Branches, Collator, text_item
from data.config import DataConfig, SourceConfig
from data.elastic import Budget, Drawn
from data.formats import parse_record
from data.formats.common import RecordSource, record_id
from data.images import LoadImages, PixelImages
from data.index import cache_folder
from data.mixture import EpochSampler, subset_table
from data.records import image_root, open_records
from data.sample import NO_SAMPLE, NO_SAMPLE_INDEX, NoSample, Reject, Rejection, Sample
from data.template import Encoded, LabelledTemplate, get_template
from visionzip.inputs import ImageInputs

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Source:
    """One configured source: its records, those of them that are used, and how they are laid out."""

    def __init__(self, config: SourceConfig, data: DataConfig) -> None:
        self.label = config.label
        self.weight = config.weight
        self.records = open_records(config, data.cache_dir)
        self.layout = RecordSource(self.label, config.format, image_root(config), config.columns)
        self.subset = subset_table(
            cache_folder(data.cache_dir), len(self.records), config.fraction, config.max_samples, data.subset_seed
        )
        if not len(self):
            raise ValueError(f"data source {self.label!r} ({config.path}) contains no records")

    def __len__(self) -> int:
        return len(self.records) if self.subset is None else len(self.subset)

    def position(self, index: int) -> int:
        """Where in the file the `index`-th used record is."""
        return index if self.subset is None else self.subset[index][0]


class Encoder:
    """A sample → an item: its images, its text around their placeholders, its labels."""

    def __init__(self, config: DataConfig, processor: Any, images: LoadImages | None = None) -> None:
        self.processor = processor
        self.template: LabelledTemplate = get_template(config.template, processor)
        self.images: LoadImages = images or PixelImages(config, processor)
        self.max_length = config.max_length
        self.cut = config.overlong == "cut"

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """`input_ids` and `labels` (L,), and the image inputs of the model's forward. Raises `Reject`."""
        encoded, images, _ = self.encode(sample)
        return {**text_item(self.processor, encoded.input_ids, encoded.labels), **images.inputs}

    def encode(self, sample: Sample) -> tuple[Encoded, ImageInputs, int]:
        """The sample's tokens within `max_length`, its images, and how many tokens it had before it was cut to that."""
        before = 0
        while True:
            images = self.images(sample)
            encoded = self.template.encode_spans(
                self.template.spans(sample.messages), images.placeholders, self.max_length
            )
            check_images(encoded, len(sample.media))
            length = len(encoded.input_ids)
            before = before or length
            if length <= self.max_length:
                break
            behind = [index for index, (_, end) in encoded.images.items() if end > self.max_length]
            shorter = rounds_before(sample, min(behind)) if behind else None
            if shorter and self.cut:
                sample = shorter
                continue
            del encoded.input_ids[self.max_length :], encoded.labels[self.max_length :]
            if behind or not self.cut or not encoded.supervised:
                raise Reject("too long", too_long(encoded, length, self.max_length))
            break
        if not encoded.supervised:
            raise Reject("empty answer", "nothing to supervise")
        return encoded, images, before


def too_long(encoded: Encoded, length: int, limit: int) -> str:
    return f"{'more than ' if encoded.cut_off else ''}{length} tokens, allowed {limit}"


def check_images(encoded: Encoded, media: int) -> None:
    if len(encoded.images) != media:
        raise Reject("template", f"{media} images, but the template shows {len(encoded.images)}")


def rounds_before(sample: Sample, media: int) -> Sample | None:
    """The sample up to the question that shows the media of this index; None where that is the first question."""
    turn = next(n for n, message in enumerate(sample.messages) if any(slot.index == media for slot in message.slots))
    messages = sample.messages[:turn]
    if not any(message.role == "assistant" for message in messages):
        return None
    kept = sum(len(message.slots) for message in messages)
    return replace(sample, messages=messages, media=sample.media[:kept])


class InstructionDataset(Dataset):
    """All records of all sources. `dataset[i]` is an item or a `Rejection`, never an exception; `dataset[-1]` is `NO_SAMPLE`.

    A worker's copy holds paths, open files and counts: no records, no offsets, no images.
    """

    def __init__(self, config: DataConfig, processor: Any, seed: int, images: LoadImages | None = None) -> None:
        self.config, self.seed = config, seed
        self.sources = [Source(source, config) for source in config.sources]
        self.encoder = Encoder(config, processor, images)
        self._make: Callable[[Sample], Any] = self.encoder
        self.starts = [0, *itertools.accumulate(len(source) for source in self.sources)]

    @property
    def images(self) -> LoadImages:
        return self.encoder.images

    def with_transform(self, make: Callable[[Sample], Any]) -> InstructionDataset:
        """The same records, `make` called for each sample in place of the encoder; what it raises is a `Rejection`, too."""
        other = copy.copy(self)
        other._make = make
        return other

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int | Drawn) -> dict[str, Any] | Branches | Rejection | NoSample:
        if index == NO_SAMPLE_INDEX:
            return NO_SAMPLE
        if isinstance(index, Drawn):
            return self._at_budgets(index)
        sample = self.sample(index)
        return sample if isinstance(sample, Rejection) else self.guarded(index, sample, self._make)

    def _at_budgets(self, drawn: Drawn) -> dict[str, Any] | Branches | Rejection:
        sample = self.sample(drawn.index)
        if isinstance(sample, Rejection):
            return sample
        return at_budgets(lambda sample: self.guarded(drawn.index, sample, self._make), sample, drawn.budgets)

    def sample(self, index: int) -> Sample | Rejection:
        """Record `index` as a `Sample`, its images not yet read."""
        source, position = self.locate(index)
        return guarded_parse(lambda: source.records[position], source.layout, position)

    def guarded(self, index: int, sample: Sample, make: Callable[[Sample], T]) -> T | Rejection:
        """What `make` makes of record `index`'s sample, or why it can't."""
        try:
            return make(sample)
        except Exception as error:
            source, position = self.locate(index)
            return as_rejection(error, sample.id, source.label, position)

    def locate(self, index: int) -> tuple[Source, int]:
        """The source of record `index`, and its position in the source's file."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} records")
        number = bisect.bisect_right(self.starts, index) - 1
        source = self.sources[number]
        return source, source.position(index - self.starts[number])

    def sampler(self, global_batch: int = 1) -> EpochSampler:
        sizes, weights = [len(source) for source in self.sources], [source.weight for source in self.sources]
        return EpochSampler(sizes, weights, self.seed, global_batch)

    def collator(self) -> Collator:
        return Collator(self.encoder.processor, self.images)


def at_budgets(make: Callable[[Sample], Any], sample: Sample, budgets: Sequence[Budget]) -> Any:
    """What `make` makes of a sample at each of its budgets: an item, `Branches` where there are several, or a `Rejection`."""
    budgets = budgets if sample.media else budgets[:1]  # without an image all are the same
    made = []
    for budget in budgets:
        made.append(make(replace(sample, budget=budget)))
        if isinstance(made[-1], Rejection):
            return made[-1]
    return made[0] if len(made) == 1 else Branches(made)


def guarded_parse(read: Callable[[], Any], layout: RecordSource, position: int) -> Sample | Rejection:
    """The sample of the record that `read` gives, or why there is none."""
    name = f"#{position}"
    try:
        record = read()
        if isinstance(record, Mapping):
            name = record_id(record.get("id"), position)
        return parse_record(record, layout, position)
    except Exception as error:
        return as_rejection(error, name, layout.label, position)


def as_rejection(error: Exception, name: str, source: str, index: int) -> Rejection:
    """Any exception is a rejection: one bad record must not end a run of thousands of good ones."""
    if isinstance(error, Reject):
        return Rejection(name, source, index, error.reason, error.detail)
    logger.debug("record %d of %s", index, source, exc_info=error)
    return Rejection(name, source, index, "unexpected error", f"{type(error).__name__}: {error}")


def build_dataset(
    config: DataConfig, processor: Any, seed: int, images: LoadImages | None = None
) -> InstructionDataset:
    """The data set of a config. `images` replaces reading and preprocessing of images (a cache of visual tokens).

    Raises `ValueError` or `FileNotFoundError` for a source that can't be opened, or that has no length (`streaming`: see
    `data.stream.build_stream`).
    """
    single_threaded_tokenizers()
    if images is None and config.cache is not None:
        images = CachedTokens(config.cache, config.frames)
    streamed = [source.label for source in config.sources if source.streaming]
    if streamed:
        raise ValueError(
            f"data source {streamed[0]!r} is streamed: it has no length and no order to shuffle or to score"
        )
    return InstructionDataset(config, processor, seed, images)


def single_threaded_tokenizers() -> None:
    """Workers are forked, which the tokenizer's threads do not survive; a sample is too short to gain by them anyway."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
