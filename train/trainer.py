"""The Trainer: where its batches come from, what a step's loss is divided by, and when a step ends the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback

from data.cache.reader import VISUAL, VISUAL_VIDEO
from data.collate import BRANCHES
from train.cached import place_tokens
from train.elastic import compress_at_budgets, count_images
from train.ending import Exit, RunEnded, StopRequest, Watchdog
from train.labels import mask_predicting
from train.layout import Layout
from train.loss import PADDED, summed_loss
from train.losses import DEFAULT, LOSSES
from train.resumable import ResumableTrainer
from train.resume import Resume
from visionzip.attach import unwrap
from visionzip.families import Family, family_for


@dataclass
class Totals:
    """Counted over all processes since the last log line."""

    supervised: int = 0
    tokens: int = 0
    images: int = 0
    samples: int = 0

    def add(self, counts: list[int]) -> None:
        self.supervised += counts[0]
        self.tokens += counts[1]
        self.images += counts[2]
        self.samples += counts[3]


@dataclass
class Hooks:
    """What the run does at points of the training loop.

    Attributes:
        records: told, on rank 0, of rejected records and of how many were read.
        before_training: called once, with the model wrapped but nothing restored, so that the base model can be evaluated.
        extra_logs: what is logged beside the loss.
        say: prints a line on rank 0.
        identity: what a checkpoint must agree with to be resumed (`train.identity`).
    """

    records: Callable[[list[dict[str, Any]], int], None] = lambda rejected, read: None
    before_training: Callable[[Any], None] = lambda trainer: None
    extra_logs: Callable[[Totals], dict[str, float]] = lambda totals: {}
    say: Callable[[str], None] = lambda text: None
    identity: dict[str, Any] = field(default_factory=dict)


class ProjectorTrainer(ResumableTrainer):
    """Trains an attached model whose trainable names were chosen (`train.trainable.free_parameters`).

    Args:
        batches: the sampler of this process: yields lists of indices, has `set_epoch`, and gives every process the same
            number of batches. None for a data set that is a stream.
        layout: how the samples of a micro-batch are laid out for the model.
        loss: name of one of `train.losses.LOSSES`.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        train_dataset: Dataset[Any],
        collator: Callable[[list[Any]], dict[str, Any]],
        batches: Sampler[list[int]] | None,
        stop: StopRequest,
        watchdog: Watchdog,
        hooks: Hooks,
        resume: Resume | None = None,
        data_timeout: float = 0.0,
        layout: Layout = PADDED,
        loss: str = DEFAULT,
        callbacks: list[Any] | None = None,
    ) -> None:
        self.batches, self.samples = batches, cast(Any, train_dataset)
        self.stop, self.hooks = stop, hooks
        self.data_timeout, self.layout, self.loss = data_timeout, layout, LOSSES[loss]
        self.family, self.totals = family_for(unwrap(model)), Totals()
        self.stopping = False
        super().__init__(
            model=model,
            args=args,
            watchdog=watchdog,
            identity=hooks.identity,
            before_training=hooks.before_training,
            say=hooks.say,
            resume=resume,
            train_dataset=train_dataset,
            data_collator=collator,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self.head = model.get_output_embeddings()

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The sampler already is this process's share, so the loader does not go through Accelerate, which would repeat
        samples to fill the last batch."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.samples,
            **(
                {"batch_size": self.args.per_device_train_batch_size}
                if self.batches is None
                else {"batch_sampler": self.batches}
            ),
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            timeout=self.data_timeout if workers else 0,
        )

    def _run_epoch(self, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.state.global_step >= self.state.max_steps:  # resumed from the end: the Trainer would take one more step
            self.control.should_training_stop = True
            return
        if self.batches is not None:
            self.batches.set_epoch(kwargs["epoch"])  # type: ignore[attr-defined]
        super()._run_epoch(**kwargs)

    def skip_batches(self, step: int) -> None:
        """A stream skips what was seen without decoding it; the loop then counts from `step` to max_steps."""
        if self.batches is None:
            self.args.ignore_data_skip = True
            seen = step * self.args.gradient_accumulation_steps
            self.samples.skip_batches(seen, self.args.per_device_train_batch_size)

    # The step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        self.watchdog.beat(f"reading data for step {self.state.global_step + 1}")
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Supervised tokens of the whole global batch: over all processes and accumulation steps.

        The one collective of a step that is ours also carries the other counts, and whether any rank was asked to stop.
        """
        counts = torch.zeros(6, dtype=torch.float64)
        rejected: list[dict[str, Any]] = []
        for batch in batch_samples:
            rejected += batch.pop("rejections", [])
            real = batch["attention_mask"].bool()
            answers = mask_predicting(batch["labels"])
            counts += torch.tensor(
                [answers.sum(), real.sum(), images_in(self.family, batch), samples_in(batch, answers), 0, 0],
                dtype=torch.float64,
            )
        counts[4] = len(rejected)
        counts[5] = float(self.stop.signal is not None)
        counts = counts.to(device)
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        *totals, bad, stopping = (int(value) for value in counts.tolist())
        self.totals.add(totals)
        self._report_rejected(rejected, bad, totals[3])
        self.stopping = self.stopping or stopping > 0
        return torch.tensor(max(totals[0], 1), device=device)

    def _report_rejected(self, rejected: list[dict[str, Any]], bad: int, used: int) -> None:
        """Rank 0 hears of every rank's bad records; it may end the run. `bad` is the same everywhere, so all join."""
        everything: list[Any] = [rejected]
        if bad and self.args.world_size > 1:
            everything = [None] * self.args.world_size
            dist.gather_object(rejected, everything if self.is_world_process_zero() else None, dst=0)
        if self.is_world_process_zero():
            self.hooks.records([row for rows in everything for row in rows], used + bad)

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """This batch's share of the mean over the supervised tokens of the global batch.

        DDP and DeepSpeed average gradients over processes, hence the factor; the sum over processes then is the mean.
        """
        labels = inputs.pop("labels")
        inputs = compress_at_budgets(self.plain, inputs)
        inputs = place_tokens(self.plain, inputs)
        loss = summed_loss(model, self.head, inputs, labels, self.layout, self.loss)
        if not torch.isfinite(loss):
            raise RunEnded(
                Exit.NOT_FINITE,
                f"the loss is {loss.item()} at step {self.state.global_step + 1} on rank {self.args.process_index}. Nothing was saved "
                "from this step on. Lower trainer.learning_rate, or look at the data of this step (python -m data.inspect)",
            )
        assert num_items_in_batch is not None
        return loss * self.args.world_size / num_items_in_batch

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.watchdog.beat(f"training step {self.state.global_step + 1}")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float | None:
        """The norm is of the reduced gradient, so all ranks see the same and end together.

        In float16 a scale that is too large makes it infinite; the step is then left out and the scale halved. DeepSpeed has done so
        by now, a scaler of torch does so afterwards. In other types DeepSpeed leaves the step out too, and every one after it: a run
        would end well without having learned anything.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        value = float(norm) if norm is not None else None
        if value is None or math.isfinite(value):
            return value
        scaler = self.accelerator.scaler
        tries_again = self.accelerator.optimizer_step_was_skipped or (scaler is not None and scaler.get_scale() > 1)
        if not (self.args.fp16 and tries_again):
            raise RunEnded(
                Exit.NOT_FINITE,
                f"the gradient is {value} at step {self.state.global_step + 1}. Nothing was saved from this step on. Lower "
                "trainer.learning_rate or set trainer.max_grad_norm",
            )
        return value

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.stopping and self.control.should_training_stop is False:
            self.control.should_save = True
            self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.state.global_step == self._initial_global_step:
            return  # the summary of a start that had nothing left to train
        if "loss" in logs:
            logs.update(self.hooks.extra_logs(self.totals))
            self.totals = Totals()
        super().log(logs, start_time)


def images_in(family: Family, batch: dict[str, Any]) -> int:
    """Images and videos of a batch, which has their pixels or their visual tokens."""
    cached = sum(len(batch.get(name) or ()) for name in (VISUAL, VISUAL_VIDEO))
    return cached or count_images(family, batch) or family.count_images(batch)


def samples_in(batch: dict[str, Any], answers: Tensor) -> int:
    """Samples of a batch, one with several rows once. `answers` ``(B, L)``: supervised places; a blank row has none."""
    rows = answers.any(dim=1)
    return sum(bool(part.any()) for part in rows.split(batch.get(BRANCHES) or [1] * len(rows)))
