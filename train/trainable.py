"""What is trained: an allow-list of parameter names. Everything else is frozen, and the count is checked before the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.config import LoraSection, TrainSection
from visionzip.families import family_for


def free_parameters(model: nn.Module, section: TrainSection) -> list[str]:
    """Freeze everything, then unfreeze what the config names; returns the names that train, in the model's order.

    Adapters are put into the model in place, so that the model stays the one that was attached (a PEFT wrapper around it
    would hide its class from the trainer and its parameters' names from a checkpoint).

    Raises:
        RuntimeError: something else than the allow-list would train.
        ValueError: the trainable count is not the expected one, or LoRA finds no layer to adapt.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chosen: set[int] = set()
    if section.lora is not None:
        chosen |= add_lora(model, section.lora)
    for part in section.parts:
        for module in modules_of(model, part):
            chosen |= {id(parameter) for parameter in model.get_submodule(module).parameters()}
    # By identity: a tied head has a name of its own, which named_parameters() leaves out.
    allowed = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in allowed)
    check_trainable(model, allowed)
    if section.expect_parameters not in (None, count_parameters(model)):
        raise ValueError(
            f"train.expect_parameters is {section.expect_parameters:,} but {count_parameters(model):,} parameters would train"
        )
    if getattr(model, "is_quantized", False):
        # The Trainer refuses quantised models without adapters; here only parts that are not quantised train.
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def modules_of(model: Any, part: str) -> list[str]:
    """Dotted names of the modules that `projector` or `llm` stands for."""
    family = family_for(model)
    if part == "projector":
        return list(family.projectors)
    head = model.get_output_embeddings()
    return [family.llm, *(name for name, module in model.named_modules() if module is head)]


def linear_layers(model: nn.Module, section: LoraSection) -> list[str]:
    """Dotted names of the layers that get an adapter. In the LLM without its head, which sees the supervised rows only.

    Raises:
        ValueError: when there is none.
    """
    roots = [name for part in section.on for name in modules_of(model, part)[: 1 if part == "llm" else None]]
    linear = [
        f"{root}.{name}".rstrip(".")
        for root in roots
        for name, module in model.get_submodule(root).named_modules()
        if isinstance(module, nn.Linear)
        and (section.targets is None or f"{root}.{name}".rsplit(".", 1)[-1] in section.targets)
    ]
    if not linear:
        raise ValueError(f"train.lora: no linear layer called {section.targets} in {', '.join(section.on)}")
    return linear


def add_lora(model: Any, section: LoraSection) -> set[int]:
    """Adapters on the linear layers of the named parts; returns their parameters' identities."""
    from peft import LoraConfig

    before = {id(parameter) for parameter in model.parameters()}
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=linear_layers(model, section),
        bias="none",
    )
    model.add_adapter(config)
    return {id(parameter) for parameter in model.parameters()} - before


def describe_trained(section: TrainSection) -> list[str]:
    """What the config lets train, in words."""
    return [*section.parts, *(f"LoRA on {part}" for part in (section.lora.on if section.lora else []))]


def check_trainable(model: nn.Module, allowed: set[str]) -> None:
    """Raises RuntimeError unless exactly `allowed` has requires_grad."""
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if training != allowed:
        extra, missing = sorted(training - allowed), sorted(allowed - training)
        raise RuntimeError(
            f"the trainable parameters are not those selected: {len(extra)} parameters too many {extra[:3]}, {len(missing)} missing {missing[:3]}"
        )


def count_parameters(model: nn.Module, trainable: bool = True) -> int:
    """Number of parameters, counted whole also where ZeRO-3 shards them."""
    return sum(count_elements(p) for p in model.parameters() if p.requires_grad or not trainable)


def count_elements(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
