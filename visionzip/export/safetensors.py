"""`safetensors`, the default: the projector in one file, with everything it belongs to in the file's own header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionzip.export.base import FORMATS, Format, Trained
from visionzip.projector import FILE, read_header, read_state, write_projector


class Safetensors(Format):
    name = "safetensors"
    summary = f"the projector alone, float32, in {FILE}"

    def recognises(self, path: Path) -> bool:
        return (path / FILE).is_file() or (path.is_file() and path.suffix == ".safetensors")

    def read(self, path: Path) -> Trained:
        return Trained(read_header(path), read_state(path))

    def write(self, trained: Trained, out: Path, *, model: Any = None, processor: Any = None, **options: Any) -> None:
        write_projector(trained.only_projector("a projector file"), trained.header, out)


FORMATS.register("safetensors")(Safetensors())
