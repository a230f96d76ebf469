"""The Trainer: what a step's loss is divided by, what is saved, and how a run goes on where another stopped."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from data.cache.reader import VISUAL, VISUAL_VIDEO
from data.collate import ANSWER_KEYS
from train import checkpoint, random_state
from train.cached import short_prompts
from train.distill import Teacher
from train.ending import Exit, RunEnded, StopRequest, Watchdog
from train.labels import supervised
from train.layout import Layout
from train.loss import DEFAULT, LOSSES, PADDED, summed_loss
from train.resume import Resume
from train.state import MasterState, shape_of
from train.trainable import check
from visionzip.attach import unwrap
from visionzip.families import Family, family_for


@dataclass
class Totals:
    """Counted over all processes since the last log line."""

    supervised: int = 0
    tokens: int = 0
    pictures: int = 0
    samples: int = 0

    def add(self, counts: list[int]) -> None:
        self.supervised += counts[0]
        self.tokens += counts[1]
        self.pictures += counts[2]
        self.samples += counts[3]


@dataclass
class Hooks:
    """What the program hangs into the training loop."""

    records: Callable[[list[dict[str, Any]], int], None] = lambda rejected, read: None
    before_training: Callable[[Any], None] = lambda trainer: None
    extra_logs: Callable[[Totals], dict[str, float]] = lambda totals: {}
    identity: dict[str, Any] = field(default_factory=dict)


class ProjectorTrainer(Trainer):
    """Trains an attached model whose trainable names were chosen (`train.trainable.choose`).

    Args:
        batches: the sampler of this process: yields lists of indices, has `set_epoch`, and gives every process the same
            number of batches. None for a data set that is a stream.
        layout: how the samples of a micro-batch are laid out for the model.
        loss: name of one of `train.loss.LOSSES`.
        distill: `temperature` and `weight` of a `train.distill.Teacher`, for data that brings its answers.
        hooks.identity: what a checkpoint must agree with to be resumed (base model, ZipConfig, data …).
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
        distill: dict[str, float] | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        self.trains = [name for name, p in model.named_parameters() if p.requires_grad]
        self.batches, self.stop, self.watchdog, self.hooks, self.resume = batches, stop, watchdog, hooks, resume
        self.data_timeout, self.layout, self.loss = data_timeout, layout, LOSSES[loss]
        self.distill = distill or {}
        self.family, self.totals = family_for(unwrap(model)), Totals()
        self.stopping = False
        self.samples: Any = train_dataset
        self.plain, self.folder = model, str(args.output_dir)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=collator,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=offloaded_adam(args),
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
        if self.batches is not None:
            self.batches.set_epoch(kwargs["epoch"])  # type: ignore[attr-defined]
        return super()._run_epoch(**kwargs)

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
            answers = supervised(batch["labels"])
            counts += torch.tensor(
                [answers.sum(), real.sum(), images_in(self.family, batch), int(answers.any(dim=1).sum()), 0, 0],
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
        inputs, labels = short_prompts(self.plain, inputs, inputs.pop("labels"))
        loss = summed_loss(model, self.head, inputs, labels, self.layout, self.teacher(inputs), self.loss)
        if not torch.isfinite(loss):
            raise RunEnded(
                Exit.NOT_FINITE,
                f"the loss is {loss.item()} at step {self.state.global_step + 1} on rank {self.args.process_index}. Nothing was saved "
                "from this step on. Lower trainer.learning_rate, or look at the data of this step (python -m data.inspect)",
            )
        assert num_items_in_batch is not None
        return loss * self.args.world_size / num_items_in_batch

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device; under DeepSpeed floating-point ones in the weights' type, but for what the loss takes in float32."""
        answers = {name: inputs.pop(name).to(self.args.device) for name in ANSWER_KEYS if name in inputs}
        return {**super()._prepare_inputs(inputs), **answers}

    def teacher(self, inputs: dict[str, Any]) -> Teacher | None:
        """Takes the teacher's answers out of the inputs, where the data brings them."""
        if "teacher_words" not in inputs:
            return None
        words, log_probs = (inputs.pop(name) for name in ANSWER_KEYS)
        return Teacher(words, log_probs, **self.distill)

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
        if "loss" in logs:
            logs.update(self.hooks.extra_logs(self.totals))
            self.totals = Totals()
        super().log(logs, start_time)

    # Start, save, go on

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Wrap the model without the Trainer's own loading: the base model is whole at that point and can be evaluated."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        check(self.plain, set(self.trains))
        self.masters = MasterState(self.plain, self.model_wrapped, self.optimizer)
        self.hooks.before_training(self)
        if self.resume is not None:
            self._restore(self.resume, max_steps)
        return prepared

    def train_or_resume(self) -> Any:
        """`train`, from `resume` where there is one.

        The Trainer reads its state from a directory on every rank; it gets one of this process's own.
        """
        if self.resume is None:
            return self.train()
        if self.batches is None:
            # A stream skips what was seen without decoding it; the loop then counts from there to max_steps.
            self.args.ignore_data_skip = True
            seen = self.resume.progress["step"] * self.args.gradient_accumulation_steps
            self.samples.skip_batches(seen, self.args.per_device_train_batch_size)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / TRAINER_STATE_NAME).write_text(self.resume.trainer_state)
            return self.train(resume_from_checkpoint=directory)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """`_restore` does this, after the model is wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.resume is not None:
            mine = self._scatter_random_states(self.resume)
            if mine is not None:
                random_state.restore(mine)

    def _scatter_random_states(self, resume: Resume) -> dict[str, Tensor] | None:
        if resume.progress["world_size"] != self.args.world_size:
            return None
        states: list[Any] = [None]
        if resume.reader is not None:
            states[0] = resume.reader.random_states()
        if self.args.world_size > 1:
            dist.broadcast_object_list(states, src=0)
        prefix = f"{self.args.process_index}/"
        return {name.removeprefix(prefix): t for name, t in states[0].items() if name.startswith(prefix)}

    def _restore(self, resume: Resume, max_steps: int) -> None:
        reader = resume.reader

        def whole(name: str) -> Tensor:
            self.watchdog.beat(f"loading {name} of {resume.path}")
            target = self.masters.parameters[name.split("/", 1)[1]]
            device = self.args.device
            value = reader.tensor(name).to(device) if reader else torch.empty(shape_of(target), device=device)
            if self.args.world_size > 1:
                dist.broadcast(value, src=0)
            return value

        self.masters.load(whole, resume.progress["optimizer_step"])
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(fit_groups(resume.progress["schedule"], len(self.masters.inner.param_groups)))
        for group, rate in zip(self.masters.inner.param_groups, schedule.get_last_lr(), strict=False):
            group["lr"] = rate
        if self.is_deepspeed_enabled:
            for name, value in resume.progress.get("engine", {}).items():
                setattr(self.model_wrapped, name, value)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Every rank hands over its share, rank 0 writes. See train/checkpoint.py."""
        self.store_flos()
        states: list[Any] = [None] * self.args.world_size
        if self.args.world_size > 1:
            dist.gather_object(random_state.capture(), states if self.is_world_process_zero() else None, dst=0)
        else:
            states[0] = random_state.capture()
        beat = lambda: self.watchdog.beat(f"writing checkpoint-{self.state.global_step}")  # noqa: E731
        writer = None
        try:
            if self.is_world_process_zero():
                writer = checkpoint.Writer(self.folder, self.state.global_step, beat)
            for name, value in self.masters.tensors():
                beat()
                if not torch.isfinite(value).all():  # ZeRO-0 in float32 tells no norm of the gradient
                    raise RunEnded(
                        Exit.NOT_FINITE,
                        f"{name} is not finite at step {self.state.global_step}, which is not saved. Lower trainer.learning_rate",
                    )
                if writer is not None:
                    writer.tensor(name, value)
            if writer is not None:
                self._write_rest(writer, states)
                writer.commit()
                checkpoint.rotate(self.folder, self.state.global_step, self.args.save_total_limit)
        except RunEnded:
            if writer is not None:
                writer.abandon()
            raise
        except OSError as error:
            if writer is not None:
                writer.abandon()
            raise RunEnded(
                Exit.STORAGE,
                f"checkpoint-{self.state.global_step} could not be written to {self.folder}: {error.strerror or error}. "
                "The last complete checkpoint is untouched; make room or set output_dir, and start the same command again",
            ) from error
        if self.args.world_size > 1:
            dist.barrier()

    def _write_rest(self, writer: checkpoint.Writer, states: list[dict[str, Tensor]]) -> None:
        tensors = {f"{rank}/{name}": t for rank, state in enumerate(states) for name, t in state.items()}
        writer.file("random.safetensors", checkpoint.as_bytes(tensors))
        for callback in (c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)):
            states_of: Any = self.state.stateful_callbacks
            states_of[type(callback).__name__] = callback.state()
        writer.file(TRAINER_STATE_NAME, trainer_state_json(self.state))
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        writer.json(
            "progress.json",
            {
                "step": self.state.global_step,
                "epoch": self.state.epoch,
                "max_steps": self.state.max_steps,
                "optimizer_step": self.masters.step(),
                "schedule": self.lr_scheduler.state_dict() if self.lr_scheduler else {},
                "layout": self.masters.layout,
                "world_size": self.args.world_size,
                "batch": [self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps],
                "engine": {name: getattr(engine, name) for name in ENGINE_COUNTERS} if engine is not None else {},
                "identity": self.hooks.identity,
            },
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What was trained is exported by `train.run`; frozen weights are never written."""


def offloaded_adam(args: Any) -> tuple[Any, dict[str, Any]] | None:
    """DeepSpeed's vectorised Adam where the optimizer lives in CPU memory, with the Trainer's own parameter groups.

    An `optimizer` section in the DeepSpeed config would put all parameters into one group and decay biases too.
    """
    plugin = getattr(args, "hf_deepspeed_config", None)
    if plugin is None or "optimizer" in plugin.config or not plugin.is_offload():
        return None
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if not plugin.config["zero_optimization"].get("offload_optimizer"):
        return None
    betas = (args.adam_beta1, args.adam_beta2)
    return DeepSpeedCPUAdam, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def fit_groups(schedule: dict[str, Any], groups: int) -> dict[str, Any]:
    """A schedule's state for another number of parameter groups: DeepSpeed drops empty ones. All have the same learning rate."""
    return {key: value[:1] * groups if isinstance(value, list) else value for key, value in schedule.items()}


ENGINE_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def trainer_state_json(state: TrainerState) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, TRAINER_STATE_NAME)
        state.save_to_json(path)
        return Path(path).read_bytes()


def images_in(family: Family, batch: dict[str, Any]) -> int:
    """Images and videos of a batch, which has their pixels or their visual tokens."""
    cached = sum(len(batch.get(name) or ()) for name in (VISUAL, VISUAL_VIDEO))
    return cached or family.count_images(batch)
