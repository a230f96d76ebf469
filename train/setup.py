"""What a run consists of beside its model: the data, which process takes which samples of it, and what of it can't be used."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cache.reader import CachedTokens
from data.config_file import config_errors
from data.dataset import InstructionDataset, build_dataset
from data.elastic import Budget, BudgetDraw, DrawnOrder
from data.images import LoadImages, PixelImages
from data.lengths import Lengths
from data.precheck import check_records
from data.rejects import RejectLog, TooManyRejected
from data.stream import build_stream, is_streamed
from train.batches import BalancedBatches, ShareOfBatches
from train.cached import check_cache, read_from_cache
from train.config import RunConfig
from train.elastic import check_supported, placeholder_counts, tokens_per_image
from train.ending import Exit, RunEnded, StopRequest, Watchdog
from train.resume import Resume
from visionzip import attached

Tokens = tuple[int, int]
"""Visual tokens of an image, compressed and full; 0 where they were not counted."""


@dataclass(frozen=True)
class Run:
    """What the steps of a run share; see `train.run`.

    Attributes:
        args: the `TrainingArguments`.
        trains: names of the parameters that train, in the model's order.
    """

    config: RunConfig
    args: Any
    model: Any
    processor: Any
    trains: list[str]
    stop: StopRequest
    watchdog: Watchdog

    @property
    def rank(self) -> int:
        return self.args.process_index

    @property
    def world_size(self) -> int:
        return self.args.world_size

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def say(self, text: str) -> None:
        """On standard error, from rank 0 alone."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def build_data(run: Run) -> Any:
    """The training data: a data set, or a stream where a source is streamed.

    Raises:
        ConfigError: a source that can't be opened, or a cache that was made with something else.
    """
    config, model, processor = run.config, run.model, run.processor
    data = config.data
    attachment = attached(model)
    images: LoadImages | None = None
    assert attachment is not None
    draw: BudgetDraw | None = None
    with config_errors("data"):
        if config.zip.budgets is not None:
            check_supported(attachment)
            draw = BudgetDraw(config.zip, config.seed, config.train.budgets_per_sample)
        if data.cache is not None:
            check_cache(config, model, processor, data.cache)
            read_from_cache(model)
            images = CachedTokens(data.cache, data.frames, usual_budget(config))
        elif config.zip.budgets is not None:
            read_from_cache(model)  # `compress_at_budgets` makes of pixels what a cache has
            images = PixelImages(data, processor, placeholder_counts(attachment))
        elif config.zip.positions == "original":
            read_from_cache(model)  # `place_tokens` makes of pixels what a cache holds
        if is_streamed(data):
            if run.args.max_steps <= 0:
                raise ValueError("a streamed source has no end; set trainer.max_steps")
            return build_stream(data, processor, config.seed, run.rank, run.world_size, images, draw)
        return build_dataset(data, processor, config.seed, images)


def build_batches(run: Run, dataset: Any, tokens: int, packed: bool) -> Any:
    """This process's share of the samples, or None for a stream, which knows its own.

    Args:
        tokens: visual tokens of an image; 0 where they were not counted.
        packed: whether a micro-batch will be one row without padding.
    """
    if is_streamed(run.config.data):
        return None
    batch, accumulation = run.args.per_device_train_batch_size, run.args.gradient_accumulation_steps
    order: Any = dataset.sampler(batch * run.world_size * accumulation)
    attachment = attached(run.model)
    assert attachment is not None
    at = None
    if run.config.zip.budgets is not None:
        order = DrawnOrder(order, BudgetDraw(run.config.zip, run.config.seed, run.config.train.budgets_per_sample))
        at = tokens_per_image(attachment, tokens)
    if run.config.data.batching == "random":
        return ShareOfBatches(order, run.rank, run.world_size, batch)
    usual = tokens or attachment.family.usual_tokens(attachment.config)
    return BalancedBatches(order, run.rank, run.world_size, batch, accumulation, Lengths(dataset, usual, at), packed)


def usual_budget(config: RunConfig) -> Budget | None:
    """The current budget, at which a cache for several is read if a sample names none; None: one that no cache need have."""
    return None if config.zip.budgets is not None else (config.zip.dominant, config.zip.contextual)


def size_of(dataset: Any) -> int | None:
    """Records; None for a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def open_rejects(run: Run, dataset: Any, resume: Resume | None, global_batch: int) -> RejectLog:
    """The list of rejected records, with what the interrupted run has read counted."""
    log = RejectLog(
        run.folder / "rejected.jsonl", run.config.data.max_rejected, size_of(dataset), resume=resume is not None
    )
    if resume is not None:
        log.read(resume.progress["step"] * global_batch)
    elif isinstance(dataset, InstructionDataset):  # too many are known before anything is computed
        looked_at, rejected = check_records(dataset)
        note_rejected(run, log, [rejection.as_dict() for rejection in rejected], read=0, looked_at=looked_at)
    return log


def note_rejected(
    run: Run, log: RejectLog | None, rejected: list[dict[str, Any]], read: int, looked_at: int = 0
) -> None:
    """Rank 0 counts what was read and lists what was not used.

    Raises:
        RunEnded: when too much of the data is bad.
    """
    assert log is not None
    log.read(read)
    try:
        new = log.add(rejected, looked_at)
    except TooManyRejected as error:
        raise RunEnded(Exit.DATA, str(error)) from error
    for row in new[:3]:
        run.say(f"not used: {row['source']} {row['id']}: {row['reason']} ({row['detail']})")
