"""The `trainer:` section: `TrainingArguments` under its own names, and the few keys that are ours."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError, model_validator

from train.compiled import check_backend

DEEPSPEED = Path(__file__).parent.parent / "configs" / "deepspeed"
STAGES = (
    "off",
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero2_offload",
    "zero3_offload",
    "zero3_nvme",
    "zero3_nvme_optimizer",
)

# Two moments of a parameter's own shape: what a checkpoint holds (train/state.py).
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")

# TrainingArguments that this program sets itself, with what to use instead.
OWNED = {
    "output_dir": "set output_dir at the top",
    "seed": "set seed at the top",
    "data_seed": "set seed at the top",
    "bf16": "set model.dtype=bfloat16",
    "fp16": "set model.dtype=float16",
    "report_to": "use the wandb section",
    "run_name": "set wandb.name",
    "project": "set wandb.project",
    "use_cpu": "a GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES= to train on the CPU",
    "local_rank": "the launcher sets it",
    "resume_from_checkpoint": "set trainer.resume to auto or a path",
    "ignore_data_skip": "a resumed run goes on with the samples not yet seen; start a new output_dir for another order",
    "save_only_model": "a checkpoint without the optimizer can't be resumed; the projector itself is saved at the end",
    "load_best_model_at_end": "the projector of the last step is what is exported; evaluate checkpoints to choose another",
    "average_tokens_across_devices": "the loss is always a mean over the supervised tokens of the whole global batch",
    "remove_unused_columns": "the collator makes what the model takes",
    "label_names": "labels are never handed to the model",
    "train_sampling_strategy": "the order of the data is the data section's",
    "auto_find_batch_size": "use python -m train.plan to find a batch that fits",
    "accelerator_config": "the data is sharded by this program",
    "parallelism_config": "data parallelism and ZeRO are what is supported",
    "fsdp": "use trainer.deepspeed",
    "fsdp_config": "use trainer.deepspeed",
    "push_to_hub": "use visionzip export",
    "disable_tqdm": "there is one bar, on rank 0",
    "eval_strategy": "evaluation runs at the start and at the end; see the eval section",
    "eval_on_start": "see the eval section",
    "do_train": "train.py trains; python -m train.evaluate evaluates",
    "do_eval": "train.py trains; python -m train.evaluate evaluates",
    "do_predict": "python -m train.evaluate evaluates",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 save already",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "neftune_noise_alpha": "not supported: noise would not survive a resume exactly",
}


class TrainerSection(BaseModel):
    """`TrainingArguments`, plus:

    Raises:
        ValueError: unknown names (with the nearest known one), wrong types, names that this program sets itself.
    """

    model_config = ConfigDict(extra="allow")

    deepspeed: str = Field("zero2", description=f"{', '.join(STAGES)}, or the path of a DeepSpeed config")
    nvme_path: str | None = Field(
        None,
        description="folder on a disk of this node that the zero3_nvme stages swap to, for one run at a time; null: /local_nvme",
    )
    resume: str | None = Field(
        "auto", description="auto: the newest complete checkpoint, if any; a path; null: start anew"
    )
    global_batch_size: int | None = Field(
        None, ge=1, description="samples in one step over all processes; sets gradient_accumulation_steps to fit"
    )
    hang_timeout: float = Field(900, gt=0, description="seconds without any progress after which every rank ends")
    data_timeout: float | None = Field(
        None, gt=0, description="seconds a worker may take for one batch; null: hang_timeout"
    )

    torch_compile: bool = Field(
        False, description="compile the norms and MLPs of the LLM's layers, once for every length; not under ZeRO-3"
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
        """The DeepSpeed config as a dict, or None for `off`.

        Raises:
            ValueError: when the file is no JSON object.
        """
        if self.deepspeed == "off":
            return None
        path = DEEPSPEED / f"{self.deepspeed}.json" if self.deepspeed in STAGES else Path(self.deepspeed)
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"trainer.deepspeed: {path} is no JSON: {error}") from None
        if not isinstance(read, dict):
            raise ValueError(f"trainer.deepspeed: {path} holds a {type(read).__name__}; expected an object")
        for swapped in swapped_to_disk(read):
            swapped["nvme_path"] = self.nvme_path or swapped.get("nvme_path")
        return read

    @property
    def sharded(self) -> bool:
        """Whether no rank has whole weights (ZeRO-3), by its name or by what a DeepSpeed config of one's own says."""
        return zero_stage(self.deepspeed_config()) == 3


def zero_stage(deepspeed: dict[str, Any] | None) -> int:
    return int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def swapped_to_disk(deepspeed: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The sections of a DeepSpeed config that swap parameters or the optimizer to a disk."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    sections = [zero.get(name) or {} for name in ("offload_param", "offload_optimizer")]
    return [section for section in sections if section.get("device") == "nvme"]


def check_disk(deepspeed: dict[str, Any] | None) -> None:
    """Raises ValueError where something is to be swapped to a disk and DeepSpeed's extension for it can't be built."""
    if not swapped_to_disk(deepspeed):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ValueError(
            "deepspeed: swapping to a disk needs libaio and its headers (apt-get install libaio-dev); without them use zero3_offload"
        )


def check_liger(given: dict[str, Any]) -> None:
    """Raises ValueError where Liger's kernels are asked for and not installed; the Trainer would say so with a traceback."""
    from transformers.utils import is_liger_kernel_available

    if given.get("use_liger_kernel") and not is_liger_kernel_available():
        raise ValueError("use_liger_kernel: liger-kernel is not installed; pip install liger-kernel")


def check_compile(section: TrainerSection, deepspeed: dict[str, Any] | None) -> None:
    """Raises ValueError where layers can't be compiled as `section` asks."""
    if not section.torch_compile:
        return
    if zero_stage(deepspeed) == 3:
        raise ValueError(
            "torch_compile: ZeRO-3 gathers weights inside of what would be compiled; take zero2, or leave it out"
        )
    check_backend(section.torch_compile_backend)


def trainer_mistakes(given: Any) -> list[str]:
    """What is wrong with the names and values that go on to `TrainingArguments`, a line each."""
    if not isinstance(given, dict):
        return []
    extra = {name: value for name, value in given.items() if name not in TrainerSection.model_fields}
    wrong = [line for name, value in extra.items() if (line := _mistake(name, value))]
    stage = given.get("deepspeed")
    if isinstance(stage, str) and stage not in STAGES and not Path(stage).is_file():
        wrong.append(f"trainer.deepspeed: {stage!r} is no file and none of {', '.join(STAGES)}")
    return wrong


@functools.cache
def _hints() -> dict[str, Any]:
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {name: hint for name, hint in get_type_hints(TrainingArguments).items() if name in names}


def _mistake(name: str, value: Any) -> str | None:
    hints = _hints()
    if name == "optim" and value not in OPTIMIZERS:
        return f"trainer.optim: {value!r} keeps a state that another ZeRO stage can't take up; use {' or '.join(OPTIMIZERS)}"
    if name in OWNED:
        return f"trainer.{name}: {OWNED[name]}"
    if name not in hints:
        known = [*(key for key in hints if key not in OWNED), *TrainerSection.model_fields]
        close = difflib.get_close_matches(name, known, n=1)
        return f"trainer.{name}: TrainingArguments has no such name" + (f"; did you mean {close[0]}?" if close else "")
    try:
        TypeAdapter(hints[name]).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return f"trainer.{name}: {error.errors()[0]['msg']} (found {value!r})"
    except PydanticUserError:
        return None  # a type pydantic has no schema for; TrainingArguments checks it itself
    return None


def accumulation(section: TrainerSection, world_size: int) -> dict[str, Any]:
    """`gradient_accumulation_steps` that makes the asked global batch with this many processes.

    Raises:
        ValueError: when the global batch is no multiple of processes × per-device batch.
    """
    extra = dict(section.model_extra or {})
    if section.global_batch_size is None:
        return extra
    device = int(extra.get("per_device_train_batch_size", 8))
    at_once = device * world_size
    if section.global_batch_size % world_size:
        raise ValueError(
            f"trainer.global_batch_size={section.global_batch_size} can't be shared by {world_size} processes; take a multiple of "
            f"{world_size}, or another number of processes"
        )
    if section.global_batch_size % at_once:
        raise ValueError(
            f"trainer.global_batch_size={section.global_batch_size} is no multiple of {world_size} processes x "
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

    given = accumulation(section, world_size)
    deepspeed = section.deepspeed_config()
    check_disk(deepspeed)
    check_liger(given)
    check_compile(section, deepspeed)
    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "logging_steps": 1,
        "save_steps": 100,
        "save_total_limit": 2,
        "lr_scheduler_type": "cosine",
        "dataloader_pin_memory": gpu,
        "ddp_timeout": int(section.hang_timeout) + 60,
        "optim": "adamw_torch",
    }
    return TrainingArguments(
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
