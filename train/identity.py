"""What a run is: stored with every checkpoint, and compared with the run that resumes from it.

Three groups, by what a difference means (`compare_identity`):

- *base*, *zip*, *trains*: the weights do not fit, or mean something else. Refused.
- *settings*: a resumed run has no use for another value (the moments and the schedule were made with the first one), or would be
  neither the one run nor the other. Refused.
- everything else takes effect from the checkpoint on, and is named: the continuation is not the run that was interrupted.
"""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist

from data.config_file import config_errors
from data.records import content_digest
from train.argument_checks import STAGES
from train.config import ConfigError, RunConfig
from train.digest import describe_processor, digest
from train.ending import Exit, RunEnded
from train.resume import Resume
from train.setup import Run
from train.state import shape_of
from visionzip.projector import fingerprint

BELONGS = ("base", "zip", "trains")
OPTIMIZATION = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)
NUMERICS = (
    "optim",
    "tf32",
    "gradient_checkpointing",
    "activation_checkpointing",
    "use_liger_kernel",
    "full_determinism",
)
SHOWN = 8
"""Differences that are listed; the others are counted."""


def describe_identity(run: Run, records: int | None) -> dict[str, Any]:
    """Everything that a checkpoint of `run` is compared by. Collective.

    Args:
        records: how many there are; None for a stream.

    Raises:
        ConfigError: the ranks do not see the same model and data.
    """
    config, args = run.config, run.args
    named = dict(run.model.named_parameters())
    base = {part: digest(values) for part, values in fingerprint(run.model).items()}
    content = content_of(config)
    check_ranks_agree({"model": base, "data": content, "number of records": records}, run.world_size)
    return {
        "base": base,
        "zip": config.zip.model_dump(),
        "trains": digest([(name, list(shape_of(named[name]))) for name in run.trains]),
        "settings": settings_of(config, args),
        "data": config.data.model_dump(mode="json", exclude={"cache_dir", "max_rejected"}),
        "records": records,
        "content": content,
        "seed": config.seed,
        "global_batch": args.per_device_train_batch_size * run.world_size * args.gradient_accumulation_steps,
        "world_size": run.world_size,
        "zero": config.trainer.deepspeed,
        "zero_file": None if config.trainer.deepspeed in STAGES else digest(config.trainer.deepspeed_config()),
        "processor": describe_processor(run.processor),
        "model.dtype": config.model.dtype,
        "model.attn_implementation": config.model.attn_implementation,
        "train.loss": config.train.loss,
        "train.share_prefix": config.train.share_prefix,
        "trainer.torch_compile": config.trainer.torch_compile,
        "trainer.per_device_train_batch_size": args.per_device_train_batch_size,
        **{f"trainer.{name}": getattr(args, name) for name in NUMERICS},
    }


def settings_of(config: RunConfig, args: Any) -> dict[str, Any]:
    """What must stay for a run to be resumed, by the key that sets it, with defaults resolved."""
    lora = config.train.lora
    return {
        **{f"trainer.{name}": getattr(args, name) for name in OPTIMIZATION},
        "model.projector": config.model.projector,
        "model.quantization": config.model.quantization,
        **({"model.frozen_dtype": config.model.frozen_dtype} if config.model.frozen_dtype else {}),
        **({"train.budgets_per_sample": config.train.budgets_per_sample} if config.zip.budgets is not None else {}),
        "train.lora": lora.model_dump(include={"r", "alpha", "dropout"}) if lora else None,
    }


def content_of(config: RunConfig) -> dict[str, str]:
    """Source → digest of what is in its files, wherever they lie.

    Raises:
        ConfigError: for a source that can't be read.
    """
    with config_errors("data"):
        return {source.label: content_digest([source], config.data.cache_dir)[:16] for source in config.data.sources}


def check_ranks_agree(seen: dict[str, Any], world_size: int) -> None:
    """Every rank reads model and data itself. Collective.

    Raises:
        ConfigError: on all ranks, where they did not read the same.
    """
    if world_size == 1:
        return
    everywhere: list[Any] = [None] * world_size
    dist.all_gather_object(everywhere, seen)
    for rank, other in enumerate(everywhere):
        different = [name for name in seen if other[name] != everywhere[0][name]]
        if different:
            raise ConfigError(
                f"rank {rank} reads another {' and '.join(different)} than rank 0; put the same files under the same path on every node"
            )


def compare_identity(resume: Resume, identity: dict[str, Any]) -> list[str]:
    """Compare a checkpoint with the run that resumes from it.

    Returns:
        A line for everything that takes effect from the checkpoint on.

    Raises:
        RunEnded: where the checkpoint belongs to another run, or was trained with settings that a resumed run can't change.
    """
    stored, now = resume.progress["identity"], to_plain(identity)
    belongs = [
        f"{key}: {shorten_value(stored.get(key))} there, {shorten_value(now[key])} here"
        for key in BELONGS
        if find_differences(stored.get(key), now[key])  # a key that is missing is one that is None
    ]
    if belongs:
        raise RunEnded(
            Exit.CONFIG,
            f"{resume.path} belongs to another run ({'; '.join(belongs)}). Set another output_dir, or trainer.resume=null to start from the beginning",
        )
    if "settings" not in stored:  # written before these were
        return ["the checkpoint does not record its optimizer settings and data; they could not be compared"]
    fixed = find_differences(stored["settings"], now["settings"])
    if fixed:
        raise RunEnded(
            Exit.CONFIG,
            f"{resume.path} was trained with other settings, which can't change on resume: {'; '.join(fixed)}. Set them back, or set "
            "another output_dir to train again (model.projector starts from an exported projector)",
        )
    rest = [name for name in now if name not in (*BELONGS, "settings")]
    found = find_differences({name: stored.get(name) for name in rest}, {name: now[name] for name in rest})
    hidden = len(found) - SHOWN
    return found if hidden <= 0 else [*found[:SHOWN], f"{hidden} more differences"]


def find_differences(before: Any, now: Any, path: str = "") -> list[str]:
    """`data.max_length was 128, is 256` for every value that differs, by its dotted path."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        start = f"{path}." if path else ""
        return [
            line
            for key in {**before, **now}
            for line in find_differences(before.get(key), now.get(key), f"{start}{key}")
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = zip(before, now, strict=True)
        return [line for number, (a, b) in enumerate(pairs) for line in find_differences(a, b, f"{path}.{number}")]
    return [f"{path} was {shorten_value(before)}, is {shorten_value(now)}"]


def to_plain(value: Any) -> Any:
    """`value` as it is after a way through JSON."""
    return json.loads(json.dumps(value))


def shorten_value(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
