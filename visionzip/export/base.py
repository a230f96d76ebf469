"""What was trained, apart from any model, and what a file format must offer to store it."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from visionzip.export.header import Header
from visionzip.fingerprint import gathered
from visionzip.projector import projector_state, required
from visionzip.registry import Registry

LORA = re.compile(r"\.(lora_\w+)\.([^.]+)\.weight$")


@dataclass(frozen=True)
class Trained:
    """The result of a run, without the frozen weights it was trained against.

    Attributes:
        header: base model, budget, fingerprint, metadata.
        projector: by name in the plain model, adapters in it merged; empty where only adapters are stored.
        adapters: LoRA tensors by name in the plain model, ``….q_proj.lora_A.weight``; empty where none were trained.
        adapter_config: PEFT's, for the adapters.
    """

    header: Header
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
        return cls(Header.of(model, metadata), projector_state(model), adapters, config)

    def with_metadata(self, metadata: dict[str, Any]) -> Trained:
        """The same with more said about it."""
        return replace(self, header=self.header.with_metadata(metadata))

    @property
    def modules(self) -> list[str]:
        """Dotted names of the projector's modules; where the file does not say, what its names have in common."""
        if self.header.modules or not self.projector:
            return list(self.header.modules)
        parts = [name.split(".")[:-1] for name in self.projector]
        shared = [same[0] for same in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))]
        return [".".join(shared)]

    def adapters_inside(self) -> set[str]:
        """Those adapters that sit in the projector itself, which is then stored merged as well."""
        return {name for name in self.adapters if name.startswith(tuple(f"{module}." for module in self.modules))}

    def only_projector(self, what: str) -> dict[str, Tensor]:
        """The projector, for a format that contains nothing else.

        Raises:
            ValueError: when something would be lost.
        """
        elsewhere = sorted(self.adapters.keys() - self.adapters_inside())
        if elsewhere or not self.projector:
            raise ValueError(
                f"{what} contains a projector, but {len(elsewhere or self.adapters)} adapter tensors were trained too "
                f"({(elsewhere or list(self.adapters))[0]} …); choose peft, or merged, which adds them to the weights"
            )
        return self.projector


class Format(ABC):
    """One way to store what was trained: one file in this folder that says everything about it. Stateless."""

    name: ClassVar[str]
    #: for `visionzip export --help` and error messages: what is written
    summary: ClassVar[str]
    #: for `visionzip inspect`: what such an export is
    what: ClassVar[str]
    #: file names that tell a directory of this format from others, also in a hub's list of files
    markers: ClassVar[tuple[str, ...]]
    #: for the model card: how it is used; ``{here}`` is its place, ``{budget}`` the arguments of its budget
    usage: ClassVar[str]
    #: for the model card: tags beside the usual ones
    tags: ClassVar[tuple[str, ...]] = ()
    #: writing needs the whole model, not only what was trained
    whole: ClassVar[bool] = False
    #: can be read back into a PyTorch model
    loadable: ClassVar[bool] = True

    def recognises(self, path: Path) -> bool:
        """Is this a file or directory of this format? Looks at names and at small files only."""
        return all((path / marker).is_file() for marker in self.markers)

    @abstractmethod
    def read(self, path: Path) -> Trained:
        """Read it back, checked; nothing that is stored is run.

        Raises:
            ValueError: for a file that is damaged or not what it says it is.
        """

    @abstractmethod
    def write(self, trained: Trained, out: Path, *, model: Any = None, processor: Any = None, **options: Any) -> None:
        """Write into the directory `out`, which exists and is empty.

        Args:
            model, processor: given where `whole` is set.
            options: the format's own (`visionzip export --vision-tower …`).

        Raises:
            OSError: when the disk is full or can't be written.
            ValueError: when the format can't store what was trained, or a weight is not finite.
        """

    def problems(self, path: Path) -> list[str]:
        """What else is wrong with an export that `read` accepts, one sentence each."""
        return []


FORMATS: Registry[Format] = Registry("export format", "visionzip.export")


def recognise(path: str | os.PathLike[str]) -> Format | None:
    """The format of what lies at `path`; None for anything else, a plain model or a run directory included."""
    place = Path(path)
    if not place.exists():
        return None
    return next((entry for _, entry in FORMATS if entry.recognises(place)), None)


def read_export(path: str | os.PathLike[str]) -> Trained:
    """What was trained, from a file or directory of any format, or from a run directory.

    Raises:
        FileNotFoundError: where there is nothing.
        ValueError: when it is none of the known formats, or damaged.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    place = run_result(place)
    found = recognise(place)
    if found is None:
        known = "; ".join(f"{name}: {entry.summary}" for name, entry in FORMATS)
        raise ValueError(f"{path} is not an export. Known formats: {known}")
    check_complete(place)
    if not found.loadable:
        raise ValueError(
            f"{path} contains {found.what}, and can't be loaded with PyTorch; load what it was exported from"
        )
    return found.read(place)


#: format → folder of a run directory that holds the run's result in it; the first that is there is all that was trained
RESULTS = {"merged": "model", "peft": "adapter", "safetensors": "projector"}
RUN_CONFIG = "config.yaml"


def is_run(path: Path) -> bool:
    """Is this the directory of a training run?"""
    return (path / RUN_CONFIG).is_file() and not (path / "config.json").is_file()


def run_result(path: str | os.PathLike[str]) -> Path:
    """The folder with everything a run trained, for the run's directory; any other path as it is.

    Raises:
        ValueError: when the run has no result yet.
    """
    place = Path(path)
    if not is_run(place) or recognise(place) is not None:
        return place
    for folder in RESULTS.values():
        if (place / folder).is_dir():
            return place / folder
    checkpoints = [found.name for found in place.glob("checkpoint-*")]
    newest = max(checkpoints, key=lambda name: (len(name), name), default=None)
    raise ValueError(
        f"{path} is the directory of a run that has not finished, so there is no projector in it yet"
        + (f"; start it again and it continues from {newest}" if newest else "")
    )


def check_complete(place: Path) -> None:
    """Raise ``ValueError`` for a run directory that contains only a part of what was trained together."""
    run = (place if place.is_dir() else place.parent).parent
    if is_run(run) and place != run:
        part, whole = (place if place.is_dir() else place.parent), run_result(run)
        if part != whole and part.name in RESULTS.values():
            raise ValueError(
                f"{place} is only a part of what {run} trained, and gives wrong answers alone; use {whole}"
            )
