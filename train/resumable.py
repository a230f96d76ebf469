"""A Trainer that saves checkpoints of the trainable state (train/checkpoint.py), and resumes from one under any ZeRO stage and number of
processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from train import checkpoint, random_state
from train.ending import Exit, RunEnded, Watchdog
from train.resume import Resume
from train.state import MasterState, shape_of
from train.trainable import check_trainable

ENGINE_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""What a DeepSpeed engine counts."""


class ResumableTrainer(Trainer):
    """See `train.trainer.ProjectorTrainer`, which trains.

    Args:
        identity: kept with every checkpoint (`train.identity`).
        before_training: called with the model wrapped and nothing restored.
        say: prints a line on rank 0.
        resume: the checkpoint to go on from.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        watchdog: Watchdog,
        identity: dict[str, Any],
        before_training: Callable[[Any], None],
        say: Callable[[str], None],
        resume: Resume | None,
        **trainer: Any,
    ) -> None:
        self.plain, self.folder = model, str(args.output_dir)
        self.trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.watchdog, self.identity, self.resume = watchdog, identity, resume
        self.before_training, self.say = before_training, say
        super().__init__(model=model, args=args, optimizer_cls_and_kwargs=offloaded_adam(args), **trainer)

    # Resume

    def train_or_resume(self) -> Any:
        """`train`, from `resume` where there is one.

        The Trainer reads its state from a directory on every rank; it gets one of this process's own.
        """
        if self.resume is None:
            return self.train()
        self.skip_batches(self.resume.progress["step"])
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / TRAINER_STATE_NAME).write_text(self.resume.trainer_state)
            return self.train(resume_from_checkpoint=directory)

    def skip_batches(self, step: int) -> None:
        """Called before the training loop starts at `step`; the loop itself skips samples of a data set."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Wrap the model without the Trainer's own loading: the base model is whole at that point and can be evaluated."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        check_trainable(self.plain, set(self.trains))
        self.masters = MasterState(self.plain, self.model_wrapped, self.optimizer)
        self.before_training(self)
        if self.resume is not None:
            self._restore(self.resume)
            self._describe_end(self.resume.progress, max_steps)
        return prepared

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """`_restore` does this, after the model is wrapped."""

    def _restore(self, resume: Resume) -> None:
        """Weights, moments, schedule and counters. Collective."""
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
        self._restore_schedule(resume.progress["schedule"])
        if self.is_deepspeed_enabled:
            for name, value in resume.progress.get("engine", {}).items():
                setattr(self.model_wrapped, name, value)

    def _restore_schedule(self, stored: dict[str, int]) -> None:
        """Set the schedule to the stored position. Its rates are computed again: max_steps may be another."""
        schedule: Any = self.lr_scheduler
        schedule.last_epoch, schedule._step_count = stored["last_epoch"], stored["_step_count"]
        rates = [
            rate * factor(schedule.last_epoch)
            for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = rates
        # DeepSpeed drops parameter groups that are empty; all have the same rate.
        for group, rate in zip(self.masters.inner.param_groups, rates, strict=False):
            group["lr"] = rate

    def _describe_end(self, stored: dict[str, Any], max_steps: int) -> None:
        """Say what another end of the run means."""
        if stored["step"] >= max_steps:
            behind = f"max_steps={max_steps} is behind it" if stored["step"] > max_steps else "it is the last step"
            self.say(f"  {behind}: nothing is trained, its weights are exported")
        elif stored["max_steps"] != max_steps:
            self.say(
                f"  max_steps was {stored['max_steps']}, is {max_steps}: the learning rate now follows a schedule of {max_steps} steps"
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.resume is not None:
            mine = self._scatter_random_states(self.resume)
            if mine is not None:
                random_state.restore(mine)

    def _scatter_random_states(self, resume: Resume) -> dict[str, Tensor] | None:
        """This rank's random states; None where the checkpoint is of another number of processes. Collective."""
        if resume.progress["world_size"] != self.args.world_size:
            return None
        states: list[Any] = [None]
        if resume.reader is not None:
            states[0] = resume.reader.random_states()
        if self.args.world_size > 1:
            dist.broadcast_object_list(states, src=0)
        prefix = f"{self.args.process_index}/"
        return {name.removeprefix(prefix): t for name, t in states[0].items() if name.startswith(prefix)}

    # Save

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Every rank hands over its share, rank 0 writes. See train/checkpoint.py.

        Raises:
            RunEnded: weights or moments that are not finite, or a disk that can't be written.
        """
        self.store_flos()
        states = self._gather_random_states()
        writer = None
        try:
            if self.is_world_process_zero():
                writer = checkpoint.Writer(self.folder, self.state.global_step, self._beat)
            self._write_masters(writer)
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
                "The last complete checkpoint is untouched; free some disk space or set another output_dir, and start the same command again",
            ) from error
        if self.args.world_size > 1:
            dist.barrier()

    def _beat(self) -> None:
        self.watchdog.beat(f"writing checkpoint-{self.state.global_step}")

    def _gather_random_states(self) -> list[dict[str, Tensor]]:
        """Of every rank, on rank 0."""
        mine = random_state.capture()
        if self.args.world_size == 1:
            return [mine]
        states: list[Any] = [None] * self.args.world_size
        dist.gather_object(mine, states if self.is_world_process_zero() else None, dst=0)
        return states

    def _write_masters(self, writer: checkpoint.Writer | None) -> None:
        """Weights and moments, one whole tensor at a time. Collective; `writer` is rank 0's."""
        for name, value in self.masters.tensors():
            self._beat()
            if not torch.isfinite(value).all():  # ZeRO-0 in float32 tells no norm of the gradient
                raise RunEnded(
                    Exit.NOT_FINITE,
                    f"{name} is not finite at step {self.state.global_step}, which is not saved. Lower trainer.learning_rate",
                )
            if writer is not None:
                writer.tensor(name, value)

    def _write_rest(self, writer: checkpoint.Writer, states: list[dict[str, Tensor]]) -> None:
        tensors = {f"{rank}/{name}": t for rank, state in enumerate(states) for name, t in state.items()}
        writer.file("random.safetensors", checkpoint.as_bytes(tensors))
        for callback in (c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)):
            states_of: Any = self.state.stateful_callbacks
            states_of[type(callback).__name__] = callback.state()
        writer.file(TRAINER_STATE_NAME, trainer_state_json(self.state))
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        schedule: Any = self.lr_scheduler
        writer.json(
            "progress.json",
            {
                "step": self.state.global_step,
                "epoch": self.state.epoch,
                "max_steps": self.state.max_steps,
                "optimizer_step": self.masters.step(),
                "schedule": {name: getattr(schedule, name) for name in ("last_epoch", "_step_count")},
                "layout": self.masters.layout,
                "world_size": self.args.world_size,
                "batch": [self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps],
                "engine": {name: getattr(engine, name) for name in ENGINE_COUNTERS} if engine is not None else {},
                "identity": self.identity,
            },
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What was trained is exported by `train.run`; frozen weights are never written."""


def offloaded_adam(args: Any) -> tuple[Any, dict[str, Any]] | None:
    """DeepSpeed's vectorised Adam where the optimizer lives in CPU memory, with the Trainer's own parameter groups.

    An `optimizer` section in the DeepSpeed config would put all parameters into one group and decay biases too.
    """
    plugin = getattr(args, "hf_deepspeed_config", None)
    if plugin is None or not plugin.is_offload():
        return None
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if not plugin.config["zero_optimization"].get("offload_optimizer"):
        return None
    betas = (args.adam_beta1, args.adam_beta2)
    return DeepSpeedCPUAdam, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def trainer_state_json(state: TrainerState) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, TRAINER_STATE_NAME)
        state.save_to_json(path)
        return Path(path).read_bytes()
