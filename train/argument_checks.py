"""Which `TrainingArguments` a run may set, and to what: names, types, bounds, and the DeepSpeed config."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

DEEPSPEED = Path(__file__).parent.parent / "configs" / "deepspeed"
STAGES = ("off", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")

# Two moments of a parameter's own shape: what a checkpoint contains (train/state.py).
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")

# Functions of the step alone, so that a resumed run can build them again. The others follow a metric, which is never measured here.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
)

CHOICES = {
    "optim": (OPTIMIZERS, "the state of others can't be resumed under another ZeRO stage"),
    "lr_scheduler_type": (SCHEDULERS, "schedulers that follow a metric are not supported"),
    "save_strategy": (("no", "steps", "epoch"), "no metric is measured while training"),
}

NO_EVALUATION = "nothing is evaluated while training; see the eval section"
NO_HUB = "use visionzip export"
NOT_USED = "has no effect here: the data section decides how batches are made"

# TrainingArguments that this program sets itself, or that would do nothing, with what to use instead.
OWNED = {
    "output_dir": "set output_dir at the top",
    "seed": "set seed at the top",
    "data_seed": "set seed at the top",
    "bf16": "set model.dtype=bfloat16",
    "fp16": "set model.dtype=float16",
    "report_to": "use the wandb section",
    "run_name": "set wandb.name",
    "project": "set wandb.project",
    "use_cpu": "a GPU is used if there is one; hide it with CUDA_VISIBLE_DEVICES= to train on the CPU",
    "local_rank": "the launcher sets it",
    "resume_from_checkpoint": "set trainer.resume to auto or a path",
    "restore_callback_states_from_checkpoint": "set trainer.resume to auto or a path",
    "ignore_data_skip": "a resumed run continues with the samples not yet seen; start a new output_dir for another order",
    "save_only_model": "a checkpoint without the optimizer can't be resumed; the projector itself is saved at the end",
    "save_on_each_node": "rank 0 alone writes; every node can resume from it",
    "load_best_model_at_end": "the projector of the last step is what is exported; evaluate checkpoints to choose another",
    "metric_for_best_model": NO_EVALUATION,
    "greater_is_better": NO_EVALUATION,
    "average_tokens_across_devices": "the loss is always a mean over the supervised tokens of the whole global batch",
    "remove_unused_columns": "the collator makes what the model takes",
    "label_names": "labels are never handed to the model",
    "train_sampling_strategy": "the order of the data is the data section's",
    "length_column_name": NOT_USED,
    "dataloader_drop_last": NOT_USED,
    "dataloader_in_order": NOT_USED,
    "dataloader_multiprocessing_context": NOT_USED,
    "auto_find_batch_size": "use python -m train.plan to find a batch that fits",
    "accelerator_config": "the data is sharded by this program",
    "parallelism_config": "data parallelism and ZeRO are what is supported",
    "fsdp": "use trainer.deepspeed",
    "fsdp_config": "use trainer.deepspeed",
    "push_to_hub": NO_HUB,
    "hub_model_id": NO_HUB,
    "hub_token": NO_HUB,
    "hub_strategy": NO_HUB,
    "hub_private_repo": NO_HUB,
    "hub_always_push": NO_HUB,
    "hub_revision": NO_HUB,
    "disable_tqdm": "there is one bar, on rank 0",
    "eval_strategy": "evaluation runs at the start and at the end; see the eval section",
    "eval_on_start": NO_EVALUATION,
    "eval_steps": NO_EVALUATION,
    "eval_delay": NO_EVALUATION,
    "eval_accumulation_steps": NO_EVALUATION,
    "eval_do_concat_batches": NO_EVALUATION,
    "eval_use_gather_object": NO_EVALUATION,
    "per_device_eval_batch_size": "set eval.batch_size",
    "bf16_full_eval": NO_EVALUATION,
    "fp16_full_eval": NO_EVALUATION,
    "prediction_loss_only": NO_EVALUATION,
    "include_for_metrics": NO_EVALUATION,
    "batch_eval_metrics": NO_EVALUATION,
    "do_train": "train.py trains; python -m train.evaluate evaluates",
    "do_eval": "train.py trains; python -m train.evaluate evaluates",
    "do_predict": "python -m train.evaluate evaluates",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 save already",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "neftune_noise_alpha": "not supported: noise would not survive a resume exactly",
    "optim_args": "AdamW's settings are adam_beta1, adam_beta2, adam_epsilon and weight_decay",
    "optim_target_modules": "trainable parameters are set in the train section",
}


def _at_least(least: float) -> tuple[Callable[[float], bool], str]:
    return lambda value: value >= least, f"must be at least {least:g}"


_POSITIVE: tuple[Callable[[float], bool], str] = (lambda value: value > 0, "must be greater than 0")
_BETA: tuple[Callable[[float], bool], str] = (lambda value: 0 <= value < 1, "must be at least 0 and less than 1")

# TrainingArguments checks none of these; most end in a traceback, and max_steps=0 or save_steps=0 in a step that nobody asked for.
BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": _POSITIVE,
    "weight_decay": _at_least(0),
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _at_least(0),
    "max_grad_norm": _at_least(0),
    "warmup_steps": _at_least(0),
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda value: value == -1 or value >= 1, "must be at least 1, or -1 to train for num_train_epochs"),
    "per_device_train_batch_size": _at_least(1),
    "gradient_accumulation_steps": _at_least(1),
    "save_steps": (_POSITIVE[0], "must be greater than 0; save_strategy=no saves nothing"),
    "save_total_limit": _at_least(1),
    "logging_steps": (_POSITIVE[0], "must be greater than 0; logging_strategy=no logs nothing"),
    "dataloader_num_workers": _at_least(0),
    "dataloader_prefetch_factor": _at_least(1),
    "torch_empty_cache_steps": _at_least(1),
    "ddp_timeout": _at_least(1),
}


def find_mistakes(given: dict[str, Any], own: list[str]) -> list[str]:
    """What is wrong with the names and values that go on to `TrainingArguments`, a line each.

    Args:
        own: names that are not TrainingArguments' but the `trainer:` section's.
    """
    wrong = [line for name, value in given.items() if name not in own and (line := _mistake(name, value, own))]
    stage = given.get("deepspeed")
    if isinstance(stage, str) and stage != "off":
        try:
            read_deepspeed_config(stage)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


@functools.cache
def _hints() -> dict[str, Any]:
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {name: hint for name, hint in get_type_hints(TrainingArguments).items() if name in names}


def _mistake(name: str, value: Any, own: list[str]) -> str | None:
    hints = _hints()
    if name in OWNED:
        return f"trainer.{name}: {OWNED[name]}"
    if name not in hints:
        close = difflib.get_close_matches(name, [*(key for key in hints if key not in OWNED), *own], n=1)
        return f"trainer.{name}: TrainingArguments has no such name" + (f"; did you mean {close[0]}?" if close else "")
    if name in CHOICES and value not in CHOICES[name][0]:
        choices, why = CHOICES[name]
        return f"trainer.{name}: {value!r} is not one of {', '.join(choices)} ({why})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"trainer.{name}: must be a finite number (found {value!r})"
    try:
        TypeAdapter(hints[name]).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return f"trainer.{name}: {error.errors()[0]['msg']} (found {value!r})"
    except PydanticUserError:
        return None  # a type pydantic has no schema for; TrainingArguments checks it itself
    if name in BOUNDS and value is not None and not BOUNDS[name][0](value):
        return f"trainer.{name}: {BOUNDS[name][1]} (found {value!r})"
    return None


def read_deepspeed_config(stage: str) -> dict[str, Any]:
    """The DeepSpeed config of a stage's name, or in a file.

    Raises:
        ValueError: no such stage or file, not a JSON object, or it sets what this program or the checkpoints decide.
    """
    path = DEEPSPEED / f"{stage}.json" if stage in STAGES else Path(stage)
    if not path.is_file():
        raise ValueError(f"trainer.deepspeed: {stage!r} is neither a file nor one of {', '.join(STAGES)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"trainer.deepspeed: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"trainer.deepspeed: {path} contains a {type(config).__name__}; expected a JSON object")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f"trainer.deepspeed: remove the {section} section from {path}; it is set by trainer.learning_rate, "
                "trainer.weight_decay, trainer.lr_scheduler_type …"
            )
    zero = config.get("zero_optimization") or {}
    for section in ("offload_param", "offload_optimizer"):
        if (zero.get(section) or {}).get("device") == "nvme":
            raise ValueError(
                f"trainer.deepspeed: {path} offloads to NVMe ({section}), which is not supported; use zero3_offload"
            )
    return config
