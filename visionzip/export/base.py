"""What was trained, apart from any model, and what a file format must offer to hold it."""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionzip.fingerprint import gathered
from visionzip.projector import header_of, projector_state, put_state, refuse_strangers, required
from visionzip.registry import Registry

LORA = re.compile(r"\.(lora_\w+)\.([^.]+)\.weight$")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The result of a run, without the frozen weights it was trained against.

    Attributes:
        header: base model, ZipConfig, fingerprint, metadata (`visionzip.projector.Header`, as a dict).
        projector: by name in the plain model, adapters in it merged; empty where only adapters are stored.
        adapters: LoRA tensors by name in the plain model, ``….q_proj.lora_A.weight``; empty where none were trained.
        adapter_config: PEFT's, for the adapters.
    """

    header: dict[str, Any]
    projector: dict[str, Tensor]
    adapters: dict[str, Tensor] = field(default_factory=dict)
    adapter_config: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: nn.Module, metadata: dict[str, Any] | None = None) -> Trained:
        """What `model`, which is attached, holds. Under ZeRO-3 every rank must call this."""
        inner: Any = required(model).model
        adapters, names = {}, set()
        for name, parameter in inner.named_parameters():
            found = LORA.search(name)
            if found:
                names.add(found[2])
                with gathered([parameter]):
                    adapters[f"{name[: found.start()]}.{found[1]}.weight"] = parameter.detach().to("cpu", copy=True)
        if len(names) > 1:
            raise ValueError(f"the model has adapters {sorted(names)}; expected one, merge or delete the others")
        config = inner.peft_config[names.pop()].to_dict() if names else None
        return cls(header_of(model, metadata), projector_state(model), adapters, config)

    @property
    def modules(self) -> list[str]:
        """Dotted names of the projector's modules; where the file does not say, what its names have in common."""
        if self.header["modules"] or not self.projector:
            return list(self.header["modules"])
        parts = [name.split(".")[:-1] for name in self.projector]
        shared = [same[0] for same in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))]
        return [".".join(shared)]

    def adapters_inside(self) -> set[str]:
        """Those adapters that sit in the projector itself, which is then stored merged as well."""
        return {name for name in self.adapters if name.startswith(tuple(f"{module}." for module in self.modules))}

    def only_projector(self, what: str) -> dict[str, Tensor]:
        """The projector, for a format that holds nothing else.

        Raises:
            ValueError: when something would be lost.
        """
        elsewhere = sorted(self.adapters.keys() - self.adapters_inside())
        if elsewhere or not self.projector:
            raise ValueError(
                f"{what} holds a projector, but {len(elsewhere or self.adapters)} adapter tensors were trained too "
                f"({(elsewhere or list(self.adapters))[0]} …); choose peft, or merged, which adds them to the weights"
            )
        return self.projector


class Format(ABC):
    """One way to keep what was trained. Stateless."""

    name: ClassVar[str]
    #: for `visionzip export --help` and `visionzip inspect`
    summary: ClassVar[str]
    #: writing needs the whole model, not only what was trained
    whole: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Is this a file or directory of this format? Looks at names and at small files only."""

    @abstractmethod
    def read(self, path: Path) -> Trained:
        """Read it back; nothing that is stored is run.

        Raises:
            ValueError: for a file that is damaged or not what it says it is.
        """

    @abstractmethod
    def write(self, trained: Trained, out: Path, *, model: Any = None, processor: Any = None, **options: Any) -> None:
        """Write into the directory `out`, which exists and is empty.

        Args:
            model, processor: given where `whole` is set.
            options: the format's own (`visionzip export --option key=value`).

        Raises:
            ValueError: when the format can't hold what was trained.
        """

    def base(self, path: Path, header: dict[str, Any]) -> str:
        """Where the frozen weights come from."""
        return str(header["base_model"])


FORMATS: Registry[Format] = Registry("export format", "visionzip.export")


def recognise(path: str | os.PathLike[str]) -> Format | None:
    """The format of what lies at `path`; None for anything else, a plain model included."""
    place = Path(path)
    if not place.exists():
        return None
    return next((entry for _, entry in FORMATS if entry.recognises(place)), None)


def read(path: str | os.PathLike[str]) -> Trained:
    """What was trained, from a file or directory of any format.

    Raises:
        FileNotFoundError: where there is nothing.
        ValueError: when it is none of the known formats, or damaged.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    found = recognise(place)
    if found is None:
        known = "; ".join(f"{name}: {entry.summary}" for name, entry in FORMATS)
        raise ValueError(f"{path} is no export of a projector. Known formats: {known}")
    return found.read(place)


def load_into(model: nn.Module, path: str | os.PathLike[str], *, force: bool = False) -> dict[str, Any]:
    """Load a projector of any format into an attached model: the start of a run, or its result put to use.

    Adapters are not loaded here: they add modules to a model, which `put` does where that is wanted.

    Args:
        force: load although encoder, LLM or ZipConfig differ. Names and shapes must match all the same.

    Returns:
        The header: what it was trained with.

    Raises:
        FileNotFoundError, ValueError: no export, damaged, trained for something else, or with adapters.
    """
    trained = read(path)
    if trained.adapters:
        raise ValueError(
            f"{path} holds {len(trained.adapters)} adapter tensors beside the projector. Export it as merged first "
            f"(visionzip export {path} --format merged --out …), and start from that as the model"
        )
    put(model, trained, str(path), force=force)
    return trained.header


def put(model: nn.Module, trained: Trained, source: str, *, force: bool = False) -> None:
    """Load what was trained into an attached model in place, adapters included.

    Raises:
        ImportError: adapters need peft.
        ValueError: as `load_into`.
    """
    attachment = required(model)
    refuse_strangers(attachment, trained.header, source, force=force)
    if not trained.header["fingerprint"]:
        log.warning("%s does not say what it was trained with: only names and shapes can be checked", source)
    if trained.adapters:
        _put_adapters(attachment.model, trained, source)
    else:
        put_state(attachment, trained.projector, source)


def _put_adapters(model: Any, trained: Trained, source: str) -> None:
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
        model.delete_adapter("default")
        raise ValueError(
            f"{source}: adapters missing {missing[:3]}, unknown {unknown[:3]}, of another shape {wrong[:3]}"
        )
    with torch.no_grad(), gathered(list(targets.values()), write=True):
        for name, parameter in targets.items():
            parameter.copy_(trained.adapters[name])


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


def with_metadata(trained: Trained, metadata: dict[str, Any]) -> Trained:
    """`trained` with more said about it."""
    return replace(trained, header={**trained.header, "metadata": {**trained.header["metadata"], **metadata}})
