"""What an export says of itself: the model it belongs to, its budget, and a checksum over both this and its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from visionzip.attach import Attachment
from visionzip.budgets import is_trained
from visionzip.config import ZipConfig
from visionzip.fingerprint import Fingerprint, check_fingerprint, differences
from visionzip.projector import check_finite, fingerprint, required
from visionzip.version import __version__


class Header(BaseModel):
    """Stored with every export; what an export of another toolkit does not say keeps its default.

    Attributes:
        format: ``visionzip-<format>/1``.
        base_model: hub id, or absolute path of a local folder.
        zip: the budget it was trained with.
        fingerprint: of the frozen halves it was trained against.
        modules: dotted names of the modules the projector's tensors belong to.
        metadata: anything JSON can hold: ``data``, ``steps``, ``trained``, ``results``.
        digest: SHA-256 over everything else here and the tensors.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: str = ""
    base_model: str = ""
    model_type: str = ""
    toolkit_version: str = ""
    zip: ZipConfig | None = None
    fingerprint: Annotated[Fingerprint, AfterValidator(check_fingerprint)] = {}
    modules: list[str] = []
    metadata: dict[str, Any] = {}
    digest: str = ""

    @classmethod
    def of(cls, model: nn.Module, metadata: dict[str, Any] | None = None) -> Header:
        """The header for an export of `model`, which is attached. Under ZeRO-3 every rank must call this."""
        attachment = required(model)
        return cls(
            base_model=stored_name(str(getattr(attachment.model.config, "_name_or_path", "") or "")),
            model_type=str(attachment.model.config.model_type),
            toolkit_version=__version__,
            zip=attachment.config,
            fingerprint=fingerprint(model),
            modules=attachment.projector_names,
            metadata=metadata or {},
        )

    def with_metadata(self, metadata: dict[str, Any]) -> Header:
        return self.model_copy(update={"metadata": {**self.metadata, **metadata}})

    def sealed(self, form: str, tensors: Mapping[str, Tensor], **more: Any) -> dict[str, Any]:
        """What is stored beside `tensors`: the fields and `more` as JSON values, with the checksum over all of it.

        Raises:
            ValueError: for tensors that are not finite.
        """
        check_finite(tensors, "nothing is exported")
        facts = {**self.model_dump(mode="json", exclude={"digest"}), "format": f"visionzip-{form}/1", **more}
        facts = json.loads(json.dumps(facts))  # the form it has when it is read back
        return {**facts, "digest": digest_of(facts, tensors)}


def stored_name(base_model: str) -> str:
    """A base model as exports name it: a local folder by its absolute path, anything else as it is."""
    return str(Path(base_model).resolve()) if base_model and Path(base_model).is_dir() else base_model


def parse_header(facts: Mapping[str, Any], source: object) -> Header:
    """Stored values, as `Header.sealed` made them, without a look at the tensors.

    Raises:
        ValueError: naming the first field that can't be used.
    """
    try:
        return Header.model_validate(facts)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{source}: {place}: {first['msg'].removeprefix('Value error, ')}") from error


def open_header(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], source: object, note: object = None) -> Header:
    """`parse_header`, and the tensors it came with checked against it. `note`: the file with the header, if that is another one.

    Raises:
        ValueError: as `parse_header`; when header or tensors were changed after they were written; when a tensor is not finite.
    """
    header = parse_header(facts, note or source)
    if header.digest and header.digest != digest_of(facts, tensors):
        raise ValueError(
            f"{source} was changed after it was written: its checksum does not match. Export or download it again"
        )
    check_finite(tensors, str(source))
    return header


def digest_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over `facts` (JSON values, a digest among them left out) and names, dtypes, shapes and bytes of `tensors`."""
    known = {key: value for key, value in facts.items() if key != "digest"}
    total = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"\0{name} {value.dtype} {list(value.shape)}\0".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return total.hexdigest()


def mismatches(attachment: Attachment, header: Header) -> list[str]:
    """In words, how what an export was trained with differs from the model it is to go into. What it does not say passes."""
    wrong: list[str] = []
    stored, here = header.zip, attachment.config
    if stored is not None and stored != here:
        fields = [name for name in ZipConfig.model_fields if getattr(stored, name) != getattr(here, name)]
        if stored.budgets is not None and here.budgets in (None, stored.budgets):
            current = (here.dominant, here.contextual)
            may_differ = {"budgets", *(("dominant", "contextual") if is_trained(stored, current) else ())}
            fields = [name for name in fields if name not in may_differ]
        wrong += [f"ZipConfig.{name}: {getattr(stored, name)} there, {getattr(here, name)} here" for name in fields]
    return wrong + (differences(fingerprint(attachment.model), header.fingerprint) if header.fingerprint else [])


def check_belongs(attachment: Attachment, header: Header, source: str, *, force: bool = False) -> None:
    """Raise ``ValueError`` that lists what differs, unless `source` was trained with what `attachment` is of."""
    wrong = [] if force else mismatches(attachment, header)
    if wrong:
        raise ValueError(
            f"{source} was trained for something else:\n  "
            + "\n  ".join(wrong)
            + "\nPass force=True (--force) to load it all the same."
        )
