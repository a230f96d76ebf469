"""The trained part on disk: a safetensors file that knows what it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Json, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from visionzip.attach import Attachment, attached
from visionzip.config import ZipConfig
from visionzip.fingerprint import Fingerprint, differences, gathered
from visionzip.fingerprint import fingerprint as _fingerprint
from visionzip.version import __version__

FILE = "projector.safetensors"
FORMAT = "visionzip-projector/1"


class Header(BaseModel):
    """What an exported file says of itself. In a safetensors file every value is a string, the last four of them JSON."""

    model_config = ConfigDict(extra="ignore")

    format: str = FORMAT
    base_model: str = ""
    model_type: str = ""
    toolkit_version: str = ""
    zip: ZipConfig | None = None  # None: the file does not say (LLaVA's own files)
    fingerprint: Fingerprint = {}  # empty: the file does not say
    modules: list[str] = []  # dotted names of what the tensors belong to
    metadata: dict[str, Any] = {}


class _StoredHeader(Header):
    zip: Json[ZipConfig]
    fingerprint: Json[Fingerprint]
    modules: Json[list[str]] = []
    metadata: Json[dict[str, Any]]


def projector_state(model: nn.Module) -> dict[str, Tensor]:
    """The projector's parameters by their name in the plain model, on the CPU; adapters in it are merged.

    Under ZeRO-3 every rank must call this.
    """
    attachment = required(model)
    state: dict[str, Tensor] = {}
    for name in attachment.projector_names:
        state |= plain_state(attachment.model.get_submodule(name), name)
    return state


def plain_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """``state_dict`` as if PEFT had never touched `module`: copies on the CPU, LoRA added to its weights.

    Looks through ``modules_to_save`` (the copy that trains is taken). Under ZeRO-3 every rank must call this.
    """
    state: dict[str, Tensor] = {}
    module = _trained(module)
    inner = getattr(module, "base_layer", None)
    start = f"{prefix}." if prefix else ""
    if isinstance(inner, nn.Module) and hasattr(module, "get_delta_weight"):
        lora: Any = module  # PEFT's, which this file does without
        state = plain_state(inner, prefix)
        with gathered(list(module.parameters())):
            for adapter in () if lora.merged else lora.active_adapters:
                if adapter in lora.lora_A:
                    weight = state[f"{start}weight"]
                    delta = lora.get_delta_weight(adapter).detach().to("cpu", torch.float32)
                    state[f"{start}weight"] = (weight.float() + delta).to(weight.dtype)
        return state
    with gathered(list(module.parameters(recurse=False))):
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if key not in module._non_persistent_buffers_set:
                state[f"{start}{key}"] = value.detach().to("cpu", copy=True).contiguous()
    for name, child in module.named_children():
        state |= plain_state(child, f"{start}{name}")
    return state


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of the two frozen halves a projector stands between: ``encoder`` and ``llm``."""
    attachment = required(model)
    return _fingerprint(attachment.model, halves(attachment))


def halves(attachment: Attachment) -> dict[str, str]:
    """Part of a fingerprint → dotted name of the frozen module."""
    return attachment.family.frozen


def header_of(model: nn.Module, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an export of `model` says of itself. Under ZeRO-3 every rank must call this."""
    attachment = required(model)
    return Header(
        base_model=str(getattr(attachment.model.config, "_name_or_path", "") or ""),
        model_type=str(attachment.model.config.model_type),
        toolkit_version=__version__,
        zip=attachment.config,
        fingerprint=fingerprint(model),
        modules=attachment.projector_names,
        metadata=metadata or {},
    ).model_dump()


def save_projector(
    model: nn.Module, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None, *, write: bool = True
) -> Path:
    """Write the projector of an attached model, with base model, ZipConfig and fingerprint.

    Args:
        path: a directory (gets ``projector.safetensors``) or a file ending in ``.safetensors``.
        metadata: anything JSON can hold, kept with it (data, steps, results).
        write: under ZeRO-3 all ranks call this, one of them with ``write=True``.

    Raises:
        ValueError: when nothing is attached to `model`.
    """
    state, header = projector_state(model), header_of(model, metadata)
    return write_projector(state, header, path) if write else _target(path)


def write_projector(state: dict[str, Tensor], header: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Tensors and header → file, never a half-written one under the final name."""
    target = _target(path)
    plain = {key: header[key] for key in ("base_model", "model_type", "toolkit_version")} | {"format": FORMAT}
    packed = {key: json.dumps(header[key]) for key in ("zip", "fingerprint", "modules", "metadata")}
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    save_file(state, aside, metadata=plain | packed)
    os.replace(aside, target)
    return target


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a projector file says of itself: ``base_model``, ``model_type``, ``zip``, ``fingerprint``, ``metadata`` …

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that is no projector of ours, or is damaged.
    """
    with _open(path) as file:
        stored = dict(file.metadata() or {})
    if stored.get("format") != FORMAT:
        raise ValueError(
            f"{path} says it is {stored.get('format', 'no format')!r}; expected a projector saved as {FORMAT!r}"
        )
    try:
        return _StoredHeader.model_validate(stored).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{path} has a header that can't be read: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a projector file, on the CPU."""
    with _open(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def load_projector(model: nn.Module, path: str | os.PathLike[str], *, force: bool = False) -> dict[str, Any]:
    """Load a projector into an attached model, if it belongs there.

    Args:
        force: load although encoder, LLM or ZipConfig differ. Keys and shapes must match all the same.

    Returns:
        The file's header.

    Raises:
        ValueError: when something differs; the message lists what.
    """
    attachment = required(model)
    header = read_header(path)
    refuse_strangers(attachment, header, str(path), force=force)
    put_state(attachment, read_state(path), str(path))
    return header


def refuse_strangers(attachment: Attachment, header: dict[str, Any], source: str, *, force: bool = False) -> None:
    """Raise ``ValueError`` with what differs, unless `source` was trained with what `attachment` is of."""
    wrong = [] if force else mismatches(attachment, header)
    if wrong:
        raise ValueError(
            f"{source} was trained for something else:\n  "
            + "\n  ".join(wrong)
            + "\nPass force=True (--force) to load it all the same."
        )


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
        raise ValueError(f"{source} does not hold this projector: missing {missing[:4]}, unknown {unknown[:4]}")
    away = [key for key, parameter in targets.items() if parameter.is_meta]  # what is copied there is lost in silence
    if away:
        raise ValueError(
            f"{source} can't be put into {away[0]}, which is not in memory: the device_map offloaded it; give "
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


def mismatches(attachment: Attachment, header: dict[str, Any]) -> list[str]:
    """In words, how what a projector was trained with differs from the model it is to go into. What it does not say passes."""
    wrong: list[str] = []
    stored, here = header["zip"], attachment.config
    if stored is not None and (there := ZipConfig(**stored)) != here:
        fields = [name for name in ZipConfig.model_fields if getattr(there, name) != getattr(here, name)]
        wrong += [f"ZipConfig.{name}: {getattr(there, name)} there, {getattr(here, name)} here" for name in fields]
    return wrong + (differences(fingerprint(attachment.model), header["fingerprint"]) if header["fingerprint"] else [])


def find(path: str | os.PathLike[str]) -> Path:
    """The projector file at `path`, which may be the file or the directory it was saved to."""
    found = Path(path)
    found = found / FILE if found.is_dir() else found
    if not found.is_file():
        raise FileNotFoundError(f"there is no projector at {path} (looked for {found})")
    return found


def required(model: nn.Module) -> Attachment:
    """What is attached to `model`.

    Raises:
        ValueError: when nothing is.
    """
    attachment = attached(model)
    if attachment is None:
        raise ValueError("nothing is attached to this model; call attach(model, processor, ZipConfig(...)) first")
    return attachment


def _target(path: str | os.PathLike[str]) -> Path:
    return Path(path) if str(path).endswith(".safetensors") else Path(path) / FILE


def _open(path: str | os.PathLike[str]) -> Any:
    file = find(path)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def _trained(module: nn.Module) -> nn.Module:
    """The copy that trains, where PEFT wrapped the module (``modules_to_save``)."""
    copies = getattr(module, "modules_to_save", None)
    return next(iter(copies.values())) if isinstance(copies, nn.ModuleDict) and len(copies) else module
