"""`peft`: an adapter directory that ``PeftModel.from_pretrained(base, directory)`` loads, without this toolkit.

A projector that was trained in full is a module to save; PEFT insists on target modules, so a projector-only adapter targets
PEFT's own dummy name. PEFT does not compress: attach the base model first (`visionzip.load` does both).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from visionzip.export.base import FORMATS, Format, Trained, lora_config
from visionzip.export.files import read_json, read_note, tensors, write_note

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DUMMY_TARGET_MODULES = "dummy-target-modules"  # peft.utils.constants: matches no module, and is no error


class Peft(Format):
    name = "peft"
    summary = "an adapter for PeftModel.from_pretrained: the projector, and LoRA where that was trained"

    def recognises(self, path: Path) -> bool:
        return (path / CONFIG).is_file()

    def read(self, path: Path) -> Trained:
        if not (path / WEIGHTS).is_file():
            raise ValueError(f"{path} has {CONFIG} but no {WEIGHTS}; adapters are read from safetensors only")
        config, header = read_json(path / CONFIG), read_note(path)
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{path} is an adapter of type {config.get('peft_type')!r}; expected LORA")
        header["base_model"] = header["base_model"] or str(config.get("base_model_name_or_path") or "")
        stored = tensors(path / WEIGHTS)
        strange = [name for name in stored if not name.startswith(PREFIX)]
        if strange:
            raise ValueError(f"{path / WEIGHTS} holds {strange[0]}; expected names that start with {PREFIX}")
        plain = {name.removeprefix(PREFIX): value for name, value in stored.items()}
        adapters = {name: value for name, value in plain.items() if ".lora_" in name}
        projector = {name: value for name, value in plain.items() if name not in adapters}
        return Trained(header, projector, adapters, config if adapters else None)

    def write(self, trained: Trained, out: Path, *, model: Any = None, processor: Any = None, **options: Any) -> None:
        config = adapter_config(trained)
        config.save_pretrained(str(out))
        whole = {} if config.modules_to_save is None else trained.projector
        save_file(
            {f"{PREFIX}{name}": value for name, value in {**whole, **trained.adapters}.items()},
            out / WEIGHTS,
            metadata={"format": "pt"},
        )
        write_note(out, trained.header, "peft")


def adapter_config(trained: Trained) -> Any:
    """PEFT's config for what was trained.

    Raises:
        ImportError: without peft.
    """
    changes = {
        "base_model_name_or_path": trained.header["base_model"] or None,
        "modules_to_save": trained.modules if trained.projector and not trained.adapters_inside() else None,
        "inference_mode": True,
    }
    if trained.adapters:
        return lora_config(trained.adapter_config or {}, **changes)
    return lora_config({"target_modules": DUMMY_TARGET_MODULES}, **changes)


FORMATS.register("peft")(Peft())
