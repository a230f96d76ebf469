"""What a model, export, checkpoint, cache or run is, in plain words."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visionzip.config import ZipConfig
from visionzip.description import (
    Description,
    bytes_of,
    format_count,
    format_results,
    format_size,
    print_description,
)
from visionzip.export.base import FORMATS, Format, Trained, check_complete, recognise
from visionzip.export.card import budget_words, format_settings, format_value
from visionzip.export.files import unpickle
from visionzip.families import FAMILIES
from visionzip.fingerprint import short_digest
from visionzip.inspect_runs import describe_cache, describe_checkpoint, describe_run
from visionzip.pretrained import read_config

__all__ = ["Description", "describe", "format_size", "print_description"]


def describe(path: str | os.PathLike[str]) -> Description:
    """What lies at `path`, or what a hub id names.

    Raises:
        ValueError: when there is nothing; whatever is there but can't be read is described as such.
    """
    place = Path(path)
    if not place.exists():
        return describe_hub_model(str(path))
    for kind in KINDS:
        found = kind(place)
        if found is not None:
            found.path = str(path)
            return found
    return describe_unknown(place)


def describe_export(path: Path) -> Description | None:
    form = recognise(path)
    if form is None:
        return None
    try:
        check_complete(path)
        trained = form.read(path)
    except ValueError as error:
        if path.is_file() and path.name not in [marker for _, each in FORMATS for marker in each.markers]:
            return _loose(path) if path.suffix == ".safetensors" else None  # anybody's
        return Description(
            f"meant to be {form.what}, but can't be used",
            problems=[str(error)],
            facts={"Size": format_size(bytes_of(path))},
        )
    what = form.what + (f", and {len(trained.adapters) // 2} LoRA adapters" if trained.adapters else "")
    return Description(
        what,
        facts=export_facts(trained, path),
        use=export_use(trained, path, form),
        problems=form.problems(path) if path.is_dir() else [],
    )


def export_facts(trained: Trained, path: Path) -> dict[str, Any]:
    header, metadata = trained.header, trained.header.metadata
    facts: dict[str, Any] = {
        "Base model": header.base_model or "not recorded",
        "Budget": budget_words(header.zip) if header.zip else "not recorded",
    }
    if header.zip:
        facts["Settings"] = format_settings(header.zip)
    if header.fingerprint:
        parts = ", ".join(f"{part} {short_digest({part: values})}" for part, values in header.fingerprint.items())
        facts["Trained against"] = f"{parts} (checked when it is loaded)"
    else:
        facts["Trained against"] = "not recorded: only names and shapes can be checked when it is loaded"
    facts["Checksum"] = f"{header.digest[:8]}, correct" if header.digest else "none: damage would not be noticed"
    for label, key in (("What was trained", "trained"), ("Data", "data"), ("Steps", "steps")):
        if key in metadata:
            facts[label] = format_value(metadata[key])
    results = metadata.get("results")
    if isinstance(results, dict) and (shown := format_results(results)):
        asked = results.get("questions")
        facts["Measured"] = shown + (f" (of {asked:,} questions)" if isinstance(asked, int) else "")
    rest = {key: value for key, value in metadata.items() if key not in ("trained", "data", "steps", "results")}
    if rest:
        facts["Also recorded"] = format_value(rest)
    facts |= tensor_facts({**trained.projector, **trained.adapters})
    facts["Size"] = format_size(bytes_of(path))
    if header.toolkit_version:
        facts["Made with"] = f"visionzip-ft {header.toolkit_version}"
    return facts


def tensor_facts(state: dict[str, Tensor]) -> dict[str, Any]:
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    shown = [f"{name.removeprefix('model.')} {list(value.shape)}" for name, value in list(state.items())[:6]]
    total = format_count(sum(value.numel() for value in state.values()))
    return {
        "Parameters": f"{total} in {len(state)} tensors, {', '.join(kinds)}",
        "Tensors": ", ".join(shown) + (" …" if len(state) > 6 else ""),
    }


def export_use(trained: Trained, path: Path, form: Format) -> list[str]:
    if not trained.header.zip:
        return [f'visionzip.load("{path}", base="…", config=ZipConfig(dominant=54, contextual=10))']
    lines = [f'model, processor = visionzip.load("{path}")', f"visionzip chat {path} --image photo.jpg"]
    return [*lines, *([] if form.whole else [f"visionzip export {path} --format merged --out …"])]


def _loose(path: Path) -> Description | None:
    """A safetensors file of another tool."""
    try:
        with safe_open(path, framework="pt") as file:  # names and sizes; the values may be many gigabytes
            state = {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shape = file.get_slice(name).get_shape()
                kind_of = (file.get_slice(name)[:0] if shape else file.get_tensor(name)).dtype
                state[name] = torch.empty(shape, dtype=kind_of, device="meta")
            stored = (file.metadata() or {}).get("format", "")
    except SafetensorError:
        stored, state = "visionzip", {}
    if stored.startswith("visionzip"):  # ours, and damaged
        form = FORMATS["safetensors"]
        try:
            form.read(path)
        except ValueError as error:
            return Description(
                f"meant to be {form.what}, but can't be used",
                problems=[str(error)],
                facts={"Size": format_size(bytes_of(path))},
            )
    return Description(
        "a safetensors file, but not a projector of this toolkit",
        facts=tensor_facts(state) | {"Size": format_size(bytes_of(path))},
    )


def describe_model(path: Path) -> Description | None:
    if not (path / "config.json").is_file():
        return None
    try:
        found = _model(str(path))
    except (OSError, ValueError, KeyError) as error:
        return Description("a directory with a config.json that transformers can't read", problems=[str(error)])
    found.facts["Size"] = format_size(bytes_of(path))
    if not [*path.glob("*.safetensors"), *path.glob("*.bin")]:
        found.problems.append("there are no weights in it (no .safetensors, no .bin)")
    if not any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        found.problems.append("there is no processor in it (no processor_config.json)")
    return found


def describe_hub_model(name: str) -> Description:
    """A model on a hub, by its config alone.

    Raises:
        ValueError: when there is none.
    """
    try:
        found = _model(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is nothing at {name}, and no model of that name can be read from the hub") from error
    found.path = name
    return found


def _model(source: str) -> Description:
    from transformers import AutoModelForImageTextToText

    config = read_config(source)
    stored = config.__dict__.pop("visionzip", None)
    config.__dict__.pop("auto_map", None)
    found = Description(
        f"a model, {(config.architectures or [config.model_type])[0]}", facts={"Type": config.model_type}
    )
    family = FAMILIES.get(config.model_type)
    if family is None:
        found.what += ", which this toolkit can't compress"
        found.facts["Can be compressed"] = f"no; supported types: {', '.join(FAMILIES.names())}"
        return found
    with torch.device("meta"):  # sizes without memory
        shell: Any = AutoModelForImageTextToText.from_config(config)
    counts = {"all": sum(p.numel() for p in shell.parameters())}
    for part, name in {**family.frozen, **{f"projector {name}": name for name in family.projectors}}.items():
        try:
            counts[part] = sum(p.numel() for p in shell.get_submodule(name).parameters())
        except AttributeError:
            continue  # a variant without this part
    found.facts["Parameters"] = f"{format_count(counts.pop('all'))}: " + ", ".join(
        f"{part} {format_count(n)}" for part, n in counts.items()
    )
    found.facts["Weights"] = str(config.dtype or "float32").removeprefix("torch.")
    stock = family(shell).stock_count()
    found.facts["Visual tokens per image"] = f"{stock:,}" if stock is not None else "depends on the image's size"
    if stored:
        found.what += ", that was compressed with VisionZip"
        found.facts["Budget"] = budget_words(ZipConfig.model_validate(stored))
    else:
        found.facts["Can be compressed"] = "yes"
        found.use = [
            f'model, processor = visionzip.load("{source}", config=ZipConfig(dominant=…, contextual=…))',
            f"visionzip chat {source} --dominant … --contextual … --image photo.jpg",
        ]
    return found


def describe_pickle(path: Path) -> Description | None:
    if not path.is_file() or path.suffix not in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        return None
    facts = {"Size": format_size(bytes_of(path))}
    try:
        state = unpickle(path)
    except ValueError as error:
        return Description("a pickle that was not opened", problems=[str(error)], facts=facts)
    return Description("a dict of tensors that torch.save wrote", facts=tensor_facts(state) | facts)


def describe_unknown(place: Path) -> Description:
    facts: dict[str, Any] = {}
    if place.is_dir():
        names = sorted(path.name + "/" * path.is_dir() for path in place.iterdir())
        shown = ", ".join(names[:12]) + (f" … ({len(names)} in all)" if len(names) > 12 else "")
        facts["Contains"] = shown or "nothing"
    else:
        facts["Size"] = format_size(place.stat().st_size)
        with open(place, "rb") as file:
            facts["Begins with"] = repr(file.read(24))
    return Description(
        f"a {'directory' if place.is_dir() else 'file'} of a kind this toolkit does not know", facts=facts
    )


#: asked in this order; each gives None for what is not of its kind
KINDS: tuple[Callable[[Path], Description | None], ...] = (
    describe_export, describe_checkpoint, describe_cache, describe_run, describe_model, describe_pickle,
)  # fmt: skip
