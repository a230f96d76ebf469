"""The trained part of an attached model in memory: read out by name, checked, written back. Files are `visionzip.export`'s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visionzip.attach import Attachment, attached
from visionzip.fingerprint import Fingerprint, gathered
from visionzip.fingerprint import fingerprint as _fingerprint


class NotFinite(ValueError):
    """Weights hold NaN or infinity."""


def projector_state(model: nn.Module) -> dict[str, Tensor]:
    """The projector's parameters by their name in the plain model, on the CPU; adapters in it are merged.

    Under ZeRO-3 every rank must call this.
    """
    attachment = required(model)
    state: dict[str, Tensor] = {}
    for name in attachment.projector_names:
        state |= plain_state(attachment.model.get_submodule(name), name)
    return state


def plain_state(module: nn.Module, prefix: str = "", *, keep: bool = True) -> dict[str, Tensor]:
    """``state_dict`` as if PEFT had never touched `module`: copies on the CPU, LoRA added to its weights.

    Looks through ``modules_to_save`` (the copy that trains is taken). Under ZeRO-3 every rank must call this; those that
    write nothing pass ``keep=False``, copy nothing and get an empty dict.
    """
    state: dict[str, Tensor] = {}
    module = _trained(module)
    inner = getattr(module, "base_layer", None)
    start = f"{prefix}." if prefix else ""
    if isinstance(inner, nn.Module) and hasattr(module, "get_delta_weight"):
        lora: Any = module  # PEFT's, which this file does without
        state = plain_state(inner, prefix, keep=keep)
        with gathered(list(module.parameters())):
            for adapter in () if lora.merged or not keep else lora.active_adapters:
                if adapter in lora.lora_A:
                    weight = state[f"{start}weight"]
                    delta = lora.get_delta_weight(adapter).detach().to("cpu", torch.float32)
                    state[f"{start}weight"] = (weight.float() + delta).to(weight.dtype)
        return state
    with gathered(list(module.parameters(recurse=False))):
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if keep and key not in module._non_persistent_buffers_set:
                state[f"{start}{key}"] = value.detach().to("cpu", copy=True).contiguous()
    for name, child in module.named_children():
        state |= plain_state(child, f"{start}{name}", keep=keep)
    return state


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of the two frozen halves a projector stands between: ``encoder`` and ``llm``."""
    attachment = required(model)
    return _fingerprint(attachment.model, halves(attachment))


def halves(attachment: Attachment) -> dict[str, str]:
    """Part of a fingerprint → dotted name of the frozen module."""
    return attachment.family.frozen


def put_state(attachment: Attachment, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` (names of the plain model) into the projector; keys and shapes must be exactly its own.

    Raises:
        ValueError: naming the first keys that are missing, unknown, of another shape, or offloaded by a device map.
    """
    targets: dict[str, nn.Parameter] = {}
    for name in attachment.projector_names:
        module = _trained(attachment.model.get_submodule(name))
        targets |= {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}
    missing, unknown = sorted(targets.keys() - state.keys()), sorted(state.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(f"{source} does not match this projector: missing {missing[:4]}, unknown {unknown[:4]}")
    offloaded = [
        key for key, parameter in targets.items() if parameter.is_meta
    ]  # copying into it would be a silent no-op
    if offloaded:
        raise ValueError(
            f"{source} cannot be loaded into {offloaded[0]}, which is not in memory: the device_map offloaded it; give "
            f"{' and '.join(attachment.projector_names)} a device in device_map"
        )
    with gathered(list(targets.values())):
        for key, parameter in targets.items():
            if parameter.shape != state[key].shape:
                raise ValueError(
                    f"{source}: {key} has shape {list(state[key].shape)}, the model's has {list(parameter.shape)}"
                )
    with torch.no_grad(), gathered(list(targets.values()), write=True):
        for key, parameter in targets.items():
            parameter.copy_(state[key])


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise `NotFinite` naming the first tensor that holds NaN or infinity."""
    for name, value in state.items():
        if value.is_floating_point() and value.itemsize > 1 and not bool(value.isfinite().all()):
            bad = int((~value.isfinite()).sum())
            raise NotFinite(f"{source}: {name} contains {bad:,} values that are not finite (NaN or infinity)")


def required(model: nn.Module) -> Attachment:
    """What is attached to `model`.

    Raises:
        ValueError: when nothing is.
    """
    attachment = attached(model)
    if attachment is None:
        raise ValueError("nothing is attached to this model; call attach(model, processor, ZipConfig(...)) first")
    return attachment


def _trained(module: nn.Module) -> nn.Module:
    """The copy that trains, where PEFT wrapped the module (``modules_to_save``)."""
    copies = getattr(module, "modules_to_save", None)
    return next(iter(copies.values())) if isinstance(copies, nn.ModuleDict) and len(copies) else module
