"""`merged`: a whole model directory for from_pretrained, with its processor, that compresses by itself

``AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)`` runs a small file in the directory, which hands
over to the two classes below. They are not subclasses of a model: transformers would skip its key conversions for a class
outside its own package and leave the head at random values. They load the stock class and attach.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionzip.attach import attach
from visionzip.config import ZipConfig
from visionzip.export.base import FORMATS, Format, Trained
from visionzip.export.files import NOTE, read_json, read_note, read_safetensors, write_json
from visionzip.export.header import open_header
from visionzip.fingerprint import fingerprint_of_state
from visionzip.manifest import find_damage, list_files
from visionzip.projector import check_finite, halves, plain_state, required

SCRIPT = "visionzip_auto.py"
CODE = '''"""Loads this model compressed: it reads {kept} of the visual tokens per image (see README.md)."""

try:
    from visionzip.export.merged import CompressedModel, CompressedProcessor
except ImportError as error:
    raise ImportError(
        "This model compresses its visual tokens with the visionzip-ft toolkit, which is not installed: "
        "pip install visionzip-ft (the package called just `visionzip` is another one). "
        "Without it the directory loads uncompressed: leave out trust_remote_code=True."
    ) from error

__all__ = ["CompressedModel", "CompressedProcessor"]
'''
_HUB = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download", "proxies")


class Merged(Format):
    name = "merged"
    summary = "a whole model directory for from_pretrained that compresses by itself"
    what = "a whole model with a fine-tuned projector, which compresses by itself"
    markers = (NOTE, SCRIPT)
    whole = True
    usage = """This directory is a whole model. With the toolkit installed (`pip install visionzip-ft`) it compresses by itself:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{here}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{here}", trust_remote_code=True)
```

`visionzip.load("{here}")` does the same without running code from this repository.

**Without `trust_remote_code=True`, or without the toolkit, it loads as a plain model that uses every visual token.** It then
works, but slowly, and with a projector that was tuned for the compressed sequence. Load model and processor the same way."""

    def read(self, path: Path) -> Trained:
        facts = read_note(path)
        names = facts.get("projector")
        if not isinstance(names, list) or not names:
            raise ValueError(f"{path / NOTE} does not name the projector's tensors")
        tensors = find_tensors(path, [str(name) for name in names])
        return Trained(open_header(facts, tensors, path, path / NOTE), tensors)

    def write(self, trained: Trained, out: Path, *, model: Any = None, processor: Any = None, **options: Any) -> None:
        from transformers import AutoModelForImageTextToText

        if model is None or processor is None:
            raise ValueError("a merged directory holds a whole model: pass the model and its processor")
        attachment = required(model)
        if getattr(attachment.model, "is_quantized", False):
            raise ValueError("the model is loaded in 8 or 4 bit; load it unquantised to merge what was trained into it")
        dtype = attachment.model.config.dtype
        state = plain_state(attachment.model)
        state |= trained.projector  # in the precision it was trained in, where the model holds a rounded copy
        check_finite(state, "nothing is exported")
        with _bare(attachment.model.config), unsharded(), torch.device("meta"):
            shell = AutoModelForImageTextToText.from_config(attachment.model.config)
        shell.config.dtype = dtype
        shell.config.auto_map = {"AutoModelForImageTextToText": f"{SCRIPT[:-3]}.CompressedModel"}
        shell.config.visionzip = attachment.config.model_dump()
        shell.generation_config = attachment.model.generation_config
        shell.save_pretrained(out, state_dict=untied(shell, state))
        save_processor(processor, out)
        config = attachment.config
        (out / SCRIPT).write_text(CODE.format(kept=f"{config.dominant} + {config.contextual}"), encoding="utf-8")
        # The LLM may have been trained too: what lies here belongs to what lies here.
        header = trained.header.model_copy(update={"fingerprint": fingerprint_of_state(state, halves(attachment))})
        files = list_files(out, sorted(path.name for path in out.iterdir() if is_guarded(path)))
        names = sorted(trained.projector)
        write_json(out / NOTE, header.sealed("merged", trained.projector, projector=names, files=files))

    def problems(self, path: Path) -> list[str]:
        try:
            found = find_damage(path, read_note(path).get("files", {}))
        except (KeyError, TypeError, AttributeError):
            return [f"the list of files in {NOTE} can't be read"]
        for name in ("config.json", "processor_config.json"):
            try:
                read_json(path / name)
            except ValueError as error:
                found.append(str(error))
        return found


def is_guarded(path: Path) -> bool:
    """Is this a file whose change would change answers, and which is not edited by hand?"""
    return path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json")


@contextmanager
def _bare(config: Any) -> Iterator[None]:
    """`config` as if it came from the plain model."""
    kept = {name: config.__dict__.pop(name) for name in ("auto_map", "visionzip") if name in config.__dict__}
    try:
        yield
    finally:
        config.__dict__.update(kept)


@contextmanager
def unsharded() -> Iterator[None]:
    """Models made inside are not sharded by ZeRO-3, which would need the other ranks: only one of them writes."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def untied(shell: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the copies of tied weights, which ``from_pretrained`` ties again."""
    tied = getattr(shell, "all_tied_weights_keys", None) or {}
    drop = {target for target, source in tied.items() if source in state and target in state}
    return {name: value for name, value in state.items() if name not in drop}


def save_processor(processor: Any, out: Path) -> None:
    """The processor's own files, as a stock one writes them, and where to find the class that attaches."""
    processor.save_pretrained(out)
    path = out / "processor_config.json"
    config = read_json(path)
    config["auto_map"] = {"AutoProcessor": f"{SCRIPT[:-3]}.CompressedProcessor"}
    write_json(path, config)


def find_tensors(directory: Path, names: list[str]) -> dict[str, Tensor]:
    """Tensors by their name in the loaded model, from files whose names transformers may have shortened in front.

    Raises:
        ValueError: when one is missing.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored, _ = read_safetensors(file, [part for name in names for part in possible_names(name)])
        for name in names:
            written = [part for part in possible_names(name) if part in stored]
            if written:
                found.setdefault(name, stored[written[0]])
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} of the projector's tensors: {missing[:4]}")
    return found


def possible_names(name: str) -> list[str]:
    """``a.b.c.weight`` → itself, ``b.c.weight``: transformers writes ``model.`` away, and no more than that."""
    return [name, name.removeprefix("model.")] if name.startswith("model.") else [name]


class CompressedModel:
    """What ``auto_map`` names for the model. `from_pretrained` gives an instance of the stock class, attached."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Asked for by transformers; nothing to note, the model that is returned is a stock one."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As ``AutoModelForImageTextToText.from_pretrained``.

        Raises:
            ValueError: when the directory does not say what to keep.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        kwargs.pop("trust_remote_code", None)
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        damage = FORMATS["merged"].problems(Path(path)) if Path(path).is_dir() else []  # a hub checks what it sends
        if damage:
            raise ValueError(f"{path}: {'; '.join(damage)}. Export or download it again")
        config = config if config is not None else AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
        stored = getattr(config, "visionzip", None)
        if stored is None:
            raise ValueError(
                f"{path} does not say which visual tokens to keep (no entry `visionzip` in its config.json)"
            )
        with _bare(config):
            model = AutoModelForImageTextToText.from_pretrained(
                path, *args, config=config, trust_remote_code=False, **kwargs
            )
        remove_export_fields(model.config)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False, **hub)
        attach(model, processor, ZipConfig(**stored))
        required(model).fixed = (
            "the prompts of a model that from_pretrained loads have a fixed budget, since its processor is loaded apart from it; load "
            "both with visionzip.load(path), or call attach(model, processor, ...) first"
        )
        return model


class CompressedProcessor:
    """What ``auto_map`` names for the processor: the stock one, writing as many placeholders as the budget has tokens."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Asked for by transformers; nothing to note, the processor that is returned is a stock one."""

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:
        """As ``AutoProcessor.from_pretrained``."""
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        kwargs.pop("trust_remote_code", None)
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False, **kwargs)
        stored = ZipConfig(**config.visionzip)
        remove_export_fields(config)
        # How many placeholders an image needs follows from the model's sizes; a model without memory has those.
        with torch.device("meta"):
            shell = AutoModelForImageTextToText.from_config(config)
        attach(shell, processor, stored)
        processor.__dict__["_visionzip"].model = None  # free for attach(model, processor, another budget)
        return processor


def remove_export_fields(config: Any) -> None:
    """Take off what only the file needs."""
    for name in ("auto_map", "visionzip"):
        config.__dict__.pop(name, None)


FORMATS.register("merged")(Merged())
