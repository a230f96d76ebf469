"""Projectors in any of the export formats, and loose files of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visionzip.describe.base import Description, kind, number, size
from visionzip.export import recognise
from visionzip.export.base import Trained
from visionzip.export.card import budget_words, settings, words
from visionzip.export.files import read_json, unpickle
from visionzip.export.llava import WEIGHTS
from visionzip.fingerprint import short

WHAT = {
    "safetensors": "a projector fine-tuned with visionzip-ft",
    "llava": "a projector for LLaVA's own loader (mm_projector.bin)",
    "merged": "a whole model with a fine-tuned projector, which compresses by itself",
    "peft": "a PEFT adapter that holds a fine-tuned projector",
}


@kind("export", rank=10)
def export(path: Path) -> Description | None:
    found = recognise(path)
    if found is None:
        return None
    try:
        trained = found.read(path)
    except ValueError as error:
        if path.is_file() and path.suffix == ".bin" and path.name != WEIGHTS:
            return None  # of anybody's
        loose = _loose(path) if path.is_file() and path.suffix == ".safetensors" else None
        return loose or Description(
            f"meant to be {WHAT[found.name]}, but can't be used",
            problems=[str(error)],
            facts={"Size": size(total(path))},
        )
    what = WHAT[found.name]
    if trained.adapters:
        what += f", and {len(trained.adapters) // 2} LoRA adapters"
    described = Description(what, facts=facts_of(trained, path), use=use_of(trained, path, found.name))
    for name in ("config.json", "processor_config.json") if found.whole else ():
        try:
            read_json(path / name)
        except ValueError as error:
            described.problems.append(str(error))
    return described


def facts_of(trained: Trained, path: Path) -> dict[str, Any]:
    header, metadata = trained.header, trained.header["metadata"]
    facts: dict[str, Any] = {
        "Base model": header["base_model"] or "not recorded",
        "Kept of a picture": budget_words(header["zip"]) if header["zip"] else "not recorded",
    }
    if header["zip"]:
        facts["Settings"] = settings(header["zip"])
    if header["fingerprint"]:
        parts = ", ".join(f"{part} {short({part: values})}" for part, values in header["fingerprint"].items())
        facts["Trained against"] = f"{parts} (checked when it is loaded)"
    else:
        facts["Trained against"] = "not recorded: only names and shapes can be checked when it is loaded"
    for label, key in (("What was trained", "trained"), ("Data", "data"), ("Steps", "steps")):
        if key in metadata:
            facts[label] = words(metadata[key])
    results = metadata.get("results")
    if isinstance(results, dict):
        names = {"full": "all tokens", "training_free": "compressed", "fine_tuned": "fine-tuned"}
        shown = [
            f"{label} {100 * results[name]:.1f} %"
            for name, label in names.items()
            if isinstance(results.get(name), float)
        ]
        if shown:
            facts["Measured"] = ", ".join(shown) + (
                f" (of {results['questions']:,} questions)" if "questions" in results else ""
            )
    rest = {key: value for key, value in metadata.items() if key not in ("trained", "data", "steps", "results")}
    if rest:
        facts["Also recorded"] = words(rest)
    facts |= tensor_facts({**trained.projector, **trained.adapters})
    facts["Size"] = size(total(path))
    if header["toolkit_version"]:
        facts["Made with"] = f"visionzip-ft {header['toolkit_version']}"
    return facts


def tensor_facts(state: dict[str, Tensor]) -> dict[str, Any]:
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    shown = [f"{name.removeprefix('model.')} {list(value.shape)}" for name, value in list(state.items())[:6]]
    return {
        "Parameters": f"{number(sum(value.numel() for value in state.values()))} in {len(state)} tensors, {', '.join(kinds)}",
        "Tensors": ", ".join(shown) + (" …" if len(state) > 6 else ""),
    }


def use_of(trained: Trained, path: Path, form: str) -> list[str]:
    if not trained.header["zip"]:
        return [f'visionzip.load("{path}", base="…", config=ZipConfig(dominant=54, contextual=10))']
    lines = [f'model, processor = visionzip.load("{path}")', f"visionzip chat {path} --image photo.jpg"]
    return [*lines, *([] if form == "merged" else [f"visionzip export {path} --format merged --out …"])]


def _loose(path: Path) -> Description | None:
    """A safetensors file of somebody else's."""
    try:
        with safe_open(path, framework="pt") as file:  # names and sizes; the values may be many gigabytes
            state = {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shape = file.get_slice(name).get_shape()
                kind_of = (file.get_slice(name)[:0] if shape else file.get_tensor(name)).dtype
                state[name] = torch.empty(shape, dtype=kind_of, device="meta")
    except SafetensorError:
        return None
    return Description(
        "a safetensors file that is no projector of this toolkit's",
        facts=tensor_facts(state) | {"Size": size(total(path))},
    )


@kind("pickle", rank=60)
def pickle(path: Path) -> Description | None:
    if not path.is_file() or path.suffix not in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        return None
    try:
        state = unpickle(path)
    except ValueError as error:
        return Description("a pickle that was not opened", problems=[str(error)], facts={"Size": size(total(path))})
    return Description(
        "a dict of tensors that torch.save wrote", facts=tensor_facts(state) | {"Size": size(total(path))}
    )


def total(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
