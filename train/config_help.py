"""The keys of a config, for `--help`: types, defaults, meanings, and what the recipes in configs/ set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from data.config_file import ConfigError, read_config_file, section_of
from train.arguments import DEFAULTS
from train.config import RunConfig

CONFIGS = Path(__file__).parent.parent / "configs"

IMPORTANT = {
    "learning_rate": "peak of the schedule",
    "lr_scheduler_type": "cosine, linear, constant, constant_with_warmup, …",
    "warmup_steps": "steps of linear warmup; below 1: a share of all steps",
    "weight_decay": "AdamW's",
    "max_grad_norm": "gradients are clipped to this norm; 0: not at all",
    "num_train_epochs": "passes over the data",
    "max_steps": "optimizer steps, in place of epochs; -1: num_train_epochs",
    "per_device_train_batch_size": "samples that a GPU works on at once",
    "gradient_accumulation_steps": "follows from global_batch_size where that is set",
    "gradient_checkpointing": "compute activations again in the backward pass instead of keeping them",
    "dataloader_num_workers": "processes that read data, per GPU; 0: in the training process",
    "logging_steps": "steps between lines of metrics.jsonl",
    "save_strategy": "steps, epoch or no",
    "save_steps": "steps between checkpoints",
    "save_total_limit": "checkpoints that are kept",
}
"""TrainingArguments that most runs set; all others are accepted too."""

COMPARED = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "global_batch_size",
    "per_device_train_batch_size",
    "warmup_steps",
)
"""Keys of `trainer` by which recipes are compared."""


def describe_type(annotation: Any) -> str:
    """`int | float`, `'a' | 'b' | null` …: a type in the terms of YAML."""
    if annotation is type(None):
        return "null"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is Annotated:
        return describe_type(inner[0])
    if origin in (Union, UnionType):
        return " | ".join(map(describe_type, inner))
    if origin is list:
        return f"list of {describe_type(inner[0])}"
    return str(getattr(annotation, "__name__", annotation))


def describe_keys() -> str:
    """Every key with its type, default and meaning."""
    lines: list[str] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            inner = section_of(field.annotation)
            if inner is not None:
                mark = "[0]." if "list" in str(field.annotation) else "."
                lines.append(
                    f"\n{prefix}{name}{'' if field.is_required() else '  (optional)'}  {field.description or ''}"
                )
                walk(inner, f"{prefix}{name}{mark}")
                continue
            default = "needed" if field.is_required() else f"= {field.get_default(call_default_factory=True)!r}"
            lines.append(
                f"  {prefix}{name}: {describe_type(field.annotation)} {default}  {field.description or ''}".rstrip()
            )
        if prefix == "trainer.":
            lines.extend(describe_training_arguments())

    walk(RunConfig, "")
    return "\n".join(lines)


def describe_training_arguments() -> list[str]:
    """Those of transformers' TrainingArguments that most runs set, with the defaults that hold here."""
    from transformers import TrainingArguments

    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    lines = [
        "  every key of transformers' TrainingArguments is accepted under its own name, but for a few that this program sets",
        "  itself and names if they are given; the important ones:",
    ]
    for name, meaning in IMPORTANT.items():
        default = DEFAULTS.get(name, fields[name].default)
        default = getattr(default, "value", default)  # of an enumeration
        default = False if default is None else default  # a switch that is not set
        lines.append(f"  trainer.{name}: {type(default).__name__} = {default!r}  {meaning}")
    return lines


def describe_recipes(folder: Path = CONFIGS) -> str:
    """What the recipes set in place of these defaults, a row each."""
    rows = [["recipe", *COMPARED]]
    for path in sorted(folder.glob("*/*.yaml")):
        try:
            trainer = read_config_file(path).get("trainer") or {}
        except ConfigError:
            continue  # a config that is being edited
        rows.append([str(path.relative_to(folder)), *(str(trainer.get(name, "-")) for name in COMPARED)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def describe_config() -> str:
    """Keys and recipes: the second half of `train.py --help`."""
    return (
        f"Keys of the config, their types and defaults:\n{describe_keys()}\n\n"
        f"What the recipes in configs/ set of `trainer`:\n{describe_recipes()}"
    )
