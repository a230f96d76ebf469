"""The `trainer:` section: `TrainingArguments` under its own names, and the few keys that are ours."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from train.argument_checks import STAGES, find_mistakes, read_deepspeed_config
from train.compiled import check_backend
from train.extensions import build_extensions
from train.launch import without_deepspeed_output

DEFAULTS: dict[str, Any] = {
    "logging_steps": 1,
    "save_steps": 100,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "ddp_find_unused_parameters": False,  # every step uses all that trains: a batch without images gets a blank one
}
"""In place of those of `TrainingArguments`."""


class TrainerSection(BaseModel):
    """`TrainingArguments`, plus:

    Raises:
        ValueError: unknown names (with the nearest known one), wrong types, values out of bounds, names that this program sets itself.
    """

    model_config = ConfigDict(extra="allow")

    deepspeed: str = Field("zero2", description=f"{', '.join(STAGES)}, or the path of a DeepSpeed config")
    resume: str | None = Field(
        "auto", description="auto: the newest complete checkpoint, if any; a path; null: start from the beginning"
    )
    global_batch_size: int | None = Field(
        None, ge=1, description="samples in one step over all processes; sets gradient_accumulation_steps to fit"
    )
    hang_timeout: float = Field(900, gt=0, description="seconds without any progress after which every rank exits")
    data_timeout: float | None = Field(
        None, gt=0, description="seconds a worker may take for one batch; null: hang_timeout"
    )

    torch_compile: bool = Field(
        False,
        description="compile the norms and MLPs of the LLM's layers (whole layers under model.attn_implementation=eager), "
        "once for every length; not under ZeRO-3",
    )
    torch_compile_backend: str = Field("inductor", description="as in torch.compile")
    torch_compile_mode: str | None = Field(None, description="as in torch.compile")

    @model_validator(mode="before")
    @classmethod
    def _off_and_no_are_words(cls, given: Any) -> Any:
        """YAML 1.1 reads a bare `off` or `no` as false; where no boolean can be meant, the word was."""
        words = {"deepspeed": "off", "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
        if not isinstance(given, dict):
            return given
        return {key: words[key] if key in words and value is False else value for key, value in given.items()}

    @model_validator(mode="after")
    def _names_and_types(self) -> TrainerSection:
        wrong = trainer_mistakes({**(self.model_extra or {}), "deepspeed": self.deepspeed})
        if self.global_batch_size is not None and "gradient_accumulation_steps" in (self.model_extra or {}):
            wrong.append("trainer.gradient_accumulation_steps: follows from global_batch_size; set one of them")
        if wrong:
            raise ValueError("\n".join(sorted(wrong)))
        return self

    def deepspeed_config(self) -> dict[str, Any] | None:
        """The DeepSpeed config as a dict, or None for `off`."""
        return None if self.deepspeed == "off" else read_deepspeed_config(self.deepspeed)

    @property
    def sharded(self) -> bool:
        """Whether no rank has whole weights (ZeRO-3), by its name or by a custom DeepSpeed config."""
        return zero_stage(self.deepspeed_config()) == 3


def zero_stage(deepspeed: dict[str, Any] | None) -> int:
    return int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def check_liger(given: dict[str, Any]) -> None:
    """Raises ValueError if Liger's kernels are requested but not installed; the Trainer would say so with a traceback."""
    from transformers.utils import is_liger_kernel_available

    if given.get("use_liger_kernel") and not is_liger_kernel_available():
        raise ValueError("use_liger_kernel: liger-kernel is not installed; pip install liger-kernel")


def check_compile(section: TrainerSection, deepspeed: dict[str, Any] | None) -> None:
    """Raises ValueError where layers can't be compiled as `section` asks."""
    if not section.torch_compile:
        return
    if zero_stage(deepspeed) == 3:
        raise ValueError(
            "torch_compile: ZeRO-3 gathers weights inside what would be compiled; use zero2, or leave it out"
        )
    check_backend(section.torch_compile_backend)


def trainer_mistakes(given: Any) -> list[str]:
    """What is wrong with the names and values of a `trainer:` section that the section's own fields do not check, a line each."""
    return find_mistakes(given, list(TrainerSection.model_fields)) if isinstance(given, dict) else []


def accumulation_steps(section: TrainerSection, world_size: int) -> dict[str, Any]:
    """`gradient_accumulation_steps` that makes the asked global batch with this many processes.

    Raises:
        ValueError: when the global batch is not a multiple of processes × per-device batch.
    """
    extra = dict(section.model_extra or {})
    if section.global_batch_size is None:
        return extra
    device = int(extra.get("per_device_train_batch_size", 8))
    at_once = device * world_size
    if section.global_batch_size % world_size:
        raise ValueError(
            f"trainer.global_batch_size={section.global_batch_size} can't be divided among {world_size} processes; use a multiple of "
            f"{world_size}, or another number of processes"
        )
    if section.global_batch_size % at_once:
        raise ValueError(
            f"trainer.global_batch_size={section.global_batch_size} is not a multiple of {world_size} processes x "
            f"per_device_train_batch_size={device}; set trainer.per_device_train_batch_size to a divisor of "
            f"{section.global_batch_size // world_size}"
        )
    return {**extra, "gradient_accumulation_steps": section.global_batch_size // at_once}


def training_arguments(
    section: TrainerSection,
    *,
    output_dir: str,
    seed: int,
    dtype: Literal["float32", "bfloat16", "float16"],
    world_size: int,
) -> Any:
    """Build `TrainingArguments`. Under a launcher this also starts the process group.

    Raises:
        ValueError: from TrainingArguments itself, under the trainer section's name.
    """
    from transformers import TrainingArguments

    given = accumulation_steps(section, world_size)
    deepspeed = section.deepspeed_config()
    check_liger(given)
    check_compile(section, deepspeed)
    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        **DEFAULTS,
        "dataloader_pin_memory": gpu,
        "ddp_timeout": int(section.hang_timeout) + 60,
    }
    if deepspeed is not None:
        build_extensions(deepspeed)
    with without_deepspeed_output():  # it starts the process group
        args = TrainingArguments(
            **{**defaults, **given},
            output_dir=output_dir,
            seed=seed,
            bf16=dtype == "bfloat16",
            fp16=dtype == "float16",
            use_cpu=not gpu,
            deepspeed=deepspeed,
            report_to="none",
            remove_unused_columns=False,
            average_tokens_across_devices=True,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
        )
    check_scheduler(args)
    return args


def check_scheduler(args: Any) -> None:
    """Raises ValueError where `lr_scheduler_kwargs` do not fit the scheduler, which would end the run with a traceback later."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    steps = max(args.max_steps, 1)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_kwargs: {error}") from None
