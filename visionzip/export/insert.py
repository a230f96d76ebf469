"""Put what was trained into an attached model: projector and adapters, together or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from visionzip.attach import Attachment
from visionzip.config import ZipConfig
from visionzip.export.base import LORA, Trained, read_export
from visionzip.export.header import Header, check_belongs
from visionzip.fingerprint import gathered
from visionzip.projector import projector_state, put_state, required

log = logging.getLogger(__name__)


def load_into(model: nn.Module, path: str | os.PathLike[str], *, force: bool = False, adapters: bool = True) -> Header:
    """Load what was trained into an attached model: an export of any format, or the directory of a run.

    Args:
        force: load although encoder, LLM or ZipConfig differ. Names and shapes must match all the same.
        adapters: LoRA may be part of it, and is added to the model; False refuses it (the start of a run, whose own
            adapters it would get in the way of).

    Returns:
        The header: what it was trained with.

    Raises:
        FileNotFoundError, ValueError: no export, damaged, trained for something else, or with adapters.
        ImportError: adapters need peft.
    """
    trained = read_export(path)
    if trained.adapters and not adapters:
        raise ValueError(
            f"{path} contains {len(trained.adapters)} adapter tensors beside the projector. Export it as merged first "
            f"(visionzip export {path} --format merged --out …), and start from that as the model"
        )
    insert(model, trained, str(path), force=force)
    return trained.header


@contextmanager
def loaded_into(model: nn.Module, path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Header]:
    """As `load_into` inside the block; afterwards the model has its own projector again, and no adapters.

    Raises:
        ValueError: as `load_into`, and for a model that has adapters already.
    """
    attachment = required(model)
    if any(LORA.search(name) for name, _ in attachment.model.named_parameters()):
        raise ValueError(f"{path} can't be loaded temporarily: the model already has adapters; merge or delete them")
    before, config, earlier = projector_state(model), attachment.config, attachment.trained
    header = load_into(model, path, force=force)
    try:
        yield header
    finally:
        inner: Any = attachment.model
        if any(LORA.search(name) for name, _ in inner.named_parameters()):
            remove_adapters(inner)
        put_state(attachment, before, "the model's own projector")
        attachment.change(config)
        attachment.trained = earlier


def insert(model: nn.Module, trained: Trained, source: str, *, force: bool = False) -> None:
    """Load what was trained into an attached model in place, adapters included.

    Raises:
        ImportError: adapters need peft.
        ValueError: as `load_into`.
    """
    attachment = required(model)
    check_belongs(attachment, trained.header, source, force=force)
    warn_unchecked(trained.header, source)
    if trained.adapters:
        insert_adapters(attachment.model, trained, source)
    else:
        put_state(attachment, trained.projector, source)
    note_trained(attachment, trained.header)


def note_trained(attachment: Attachment, header: Header) -> None:
    """Let the model know which budgets the projector that is now in it was trained for."""
    stored = header.zip
    attachment.trained = stored
    if stored is not None and attachment.config.budgets is None and stored.budgets is not None:
        config = attachment.config
        attachment.change(ZipConfig.model_validate({**config.model_dump(), "budgets": stored.budgets}))


def warn_unchecked(header: Header, source: str) -> None:
    """Log in a line what can't be checked of an export: those of other toolkits and of earlier versions of this one say less."""
    if not header.fingerprint:
        log.warning(
            "%s does not say what it was trained with and has no checksum: only names and shapes can be checked", source
        )
    elif not header.digest:
        log.warning("%s has no checksum: a change since it was written would not be noticed", source)


def insert_adapters(model: Any, trained: Trained, source: str) -> None:
    """The projector, unless it is the adapters that changed it, and LoRA on the layers it was trained on."""
    config = lora_config(trained.adapter_config or {}, modules_to_save=None, inference_mode=True)
    if trained.projector and not trained.adapters_inside():
        put_state(required(model), trained.projector, source)
    try:
        model.add_adapter(config)
    except ValueError as error:
        raise ValueError(f"{source}: its adapters do not fit this model: {error}") from error
    targets = {}
    for name, parameter in model.named_parameters():
        found = LORA.search(name)
        if found:
            targets[f"{name[: found.start()]}.{found[1]}.weight"] = parameter
    missing, unknown = sorted(targets.keys() - trained.adapters), sorted(trained.adapters.keys() - targets)
    wrong = [
        name for name in targets if name in trained.adapters and targets[name].shape != trained.adapters[name].shape
    ]
    if missing or unknown or wrong:
        remove_adapters(model)
        raise ValueError(
            f"{source}: adapters missing {missing[:3]}, unknown {unknown[:3]}, of another shape {wrong[:3]}"
        )
    with torch.no_grad(), gathered(list(targets.values()), write=True):
        for name, parameter in targets.items():
            parameter.copy_(trained.adapters[name])


def remove_adapters(model: Any) -> None:
    """Take LoRA layers off again, and put the layers they wrapped back in their places."""
    for name, module in list(model.named_modules()):
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, nn.Module) and hasattr(module, "lora_A"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, inner)
    del model.peft_config
    model._hf_peft_config_loaded = False


def lora_config(stored: dict[str, Any], **changes: Any) -> Any:
    """PEFT's config from what a file or another version of PEFT holds; keys this one does not know are left out.

    Raises:
        ImportError: without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("adapters need peft: pip install peft") from error
    known = LoraConfig.__dataclass_fields__.keys() - {"peft_type"}
    return LoraConfig(**{name: value for name, value in {**stored, **changes}.items() if name in known})
