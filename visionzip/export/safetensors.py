"""`safetensors`: the projector alone, float32, in projector.safetensors (default)

The header is the file's own metadata, whose values have to be strings; other values are stored as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from visionzip.export.base import FORMATS, Format, Trained
from visionzip.export.files import read_safetensors, write_file
from visionzip.export.header import open_header

FILE = "projector.safetensors"
FORMAT = "visionzip-projector/1"
PLAIN = ("format", "base_model", "model_type", "toolkit_version", "digest")


class Safetensors(Format):
    name = "safetensors"
    summary = f"the projector alone, float32, in {FILE}"
    what = "a projector fine-tuned with visionzip-ft"
    markers = (FILE,)
    usage = """```python
from PIL import Image

import visionzip  # pip install visionzip-ft

model, processor = visionzip.load("{here}")  # a transformers model and its processor, compressed

messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=Image.open("photo.jpg"), return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

    def recognises(self, path: Path) -> bool:
        return super().recognises(path) or (path.is_file() and path.suffix == ".safetensors")

    def read(self, path: Path) -> Trained:
        file = path / FILE if path.is_dir() else path
        tensors, metadata = read_safetensors(file)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{file} says it is {metadata.get('format', 'no format')!r}; expected a projector saved as {FORMAT!r}"
            )
        return Trained(open_header(unpack(metadata, file), tensors, file), tensors)

    def write(self, trained: Trained, out: Path, *, model: Any = None, processor: Any = None, **options: Any) -> None:
        write_projector(trained, out / FILE)


def write_projector(trained: Trained, file: Path) -> Path:
    tensors = trained.only_projector("a projector file")
    facts = trained.header.sealed("projector", tensors)
    packed = {name: value if name in PLAIN else json.dumps(value) for name, value in facts.items()}
    return write_file(file, save(tensors, metadata=packed))


def unpack(metadata: dict[str, str], file: Path) -> dict[str, Any]:
    """Metadata of a projector file as JSON values.

    Raises:
        ValueError: naming the entry that is none, or is missing.
    """
    missing = [name for name in ("zip", "fingerprint") if name not in metadata]
    if missing:
        raise ValueError(f"{file} has a header that can't be read: {missing[0]} is missing")
    facts: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            facts[name] = text if name in PLAIN else json.loads(text)
        except ValueError as error:
            raise ValueError(f"{file} has a header that can't be read: {name}: {error}") from error
    return facts


def save_projector(
    model: nn.Module, path: str | os.PathLike[str], metadata: dict[str, Any] | None = None, *, write: bool = True
) -> Path:
    """Write the projector of an attached model, with base model, budget, fingerprint and checksum.

    Args:
        path: a directory (gets ``projector.safetensors``) or a file ending in ``.safetensors``.
        metadata: anything JSON can hold, kept with it (data, steps, results).
        write: under ZeRO-3 all ranks call this, one of them with ``write=True``.

    Raises:
        ValueError: when nothing is attached to `model`, it has adapters that would be lost, or a weight is not finite.
        OSError: when the file can't be written; an older one is left as it was.
    """
    file = Path(path) if str(path).endswith(".safetensors") else Path(path) / FILE
    trained = Trained.of(model, metadata)
    trained.header.sealed("projector", trained.only_projector("a projector file"))  # refused by every rank alike
    return write_projector(trained, file) if write else file


FORMATS.register("safetensors")(Safetensors())
