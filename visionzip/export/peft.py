"""`peft`: an adapter for PeftModel.from_pretrained, with the projector and LoRA where that was trained

A projector that was trained in full is a module to save; PEFT insists on target modules, so a projector-only adapter targets
PEFT's own dummy name. PEFT does not compress: attach the base model first (`visionzip.load` does both).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from visionzip.export.base import FORMATS, Format, Trained
from visionzip.export.files import NOTE, read_json, read_note, read_safetensors, write_file, write_json
from visionzip.export.header import open_header
from visionzip.export.insert import lora_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DUMMY_TARGET_MODULES = "dummy-target-modules"  # peft.utils.constants: matches no module, and is no error
#: what of PEFT's config decides what its tensors do
SETTINGS = ("alpha_pattern", "fan_in_fan_out", "lora_alpha", "r", "rank_pattern", "use_dora", "use_rslora")


class Peft(Format):
    name = "peft"
    summary = "an adapter for PeftModel.from_pretrained: the projector, and LoRA where that was trained"
    what = "a PEFT adapter that holds a fine-tuned projector"
    markers = (CONFIG,)
    tags = ("peft",)
    usage = """```python
import visionzip  # pip install visionzip-ft peft

model, processor = visionzip.load("{here}")
```

Or with PEFT alone, which loads the weights and does not compress:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{here}")
```"""

    def read(self, path: Path) -> Trained:
        if not (path / WEIGHTS).is_file():
            raise ValueError(f"{path} has {CONFIG} but no {WEIGHTS}; adapters are read from safetensors only")
        config, facts = read_json(path / CONFIG), read_note(path)
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{path} is an adapter of type {config.get('peft_type')!r}; expected LORA")
        stored, _ = read_safetensors(path / WEIGHTS)
        strange = [name for name in stored if not name.startswith(PREFIX)]
        if strange:
            raise ValueError(f"{path / WEIGHTS} contains {strange[0]}; expected names that start with {PREFIX}")
        tensors = {name.removeprefix(PREFIX): value for name, value in stored.items()}
        header = open_header(facts, tensors, path, path / NOTE)
        check_settings(facts.get("adapter"), config, path)
        if not header.base_model:
            header = header.model_copy(update={"base_model": str(config.get("base_model_name_or_path") or "")})
        adapters = {name: value for name, value in tensors.items() if ".lora_" in name}
        projector = {name: value for name, value in tensors.items() if name not in adapters}
        return Trained(header, projector, adapters, config if adapters else None)

    def write(self, trained: Trained, out: Path, *, model: Any = None, processor: Any = None, **options: Any) -> None:
        config = adapter_config(trained)
        config.save_pretrained(str(out))
        whole = {} if config.modules_to_save is None else trained.projector
        tensors = {**whole, **trained.adapters}
        stored = {f"{PREFIX}{name}": value for name, value in tensors.items()}
        settings = {name: value for name, value in read_json(out / CONFIG).items() if name in SETTINGS}
        facts = trained.header.sealed("peft", tensors, adapter=settings)
        write_file(out / WEIGHTS, save(stored, metadata={"format": "pt"}))
        write_json(out / NOTE, facts)


def check_settings(stored: Any, config: Mapping[str, Any], path: Path) -> None:
    """Raise ``ValueError`` where PEFT's config is not the one its tensors were written with."""
    for name, value in (stored or {}).items():
        if config.get(name) != value:
            raise ValueError(
                f"{path / CONFIG} was changed after it was written: {name} is {config.get(name)!r}; expected {value!r}"
            )


def adapter_config(trained: Trained) -> Any:
    """PEFT's config for what was trained.

    Raises:
        ImportError: without peft.
    """
    changes = {
        "base_model_name_or_path": trained.header.base_model or None,
        "modules_to_save": trained.modules if trained.projector and not trained.adapters_inside() else None,
        "inference_mode": True,
    }
    if trained.adapters:
        return lora_config(trained.adapter_config or {}, **changes)
    return lora_config({"target_modules": DUMMY_TARGET_MODULES}, **changes)


FORMATS.register("peft")(Peft())
