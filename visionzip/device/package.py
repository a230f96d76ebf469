"""What lies in a directory that `visionzip export --format onnx` wrote, read and checked; nothing in it is run.

The graphs are data to ONNX Runtime: no library of custom operators is loaded, and ``device.json`` may only name files beside itself.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "device.json"
FORMAT = "visionzip-onnx/1"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Package:
    """The contents of ``device.json``.

    Attributes:
        path: the directory.
        budgets: name (``"16"``, ``"all"``) → ``{"file": graph, "tokens": visual tokens per image}``.
        default: the name of the budget that is used unless another one is asked for.
        language: ``file``, ``layers``, ``kv_heads``, ``head_dim``, ``hidden`` and ``limit`` (positions) of the LLM's graph.
        image: see `visionzip.device.pixels`.
        prompt: see `visionzip.device.prompt`.
        end_ids: tokens that end an answer.
        precision: of the weights, ``vision`` and ``language``.
        facts: all of ``device.json``.
    """

    path: Path
    budgets: dict[str, dict[str, Any]]
    default: str
    language: dict[str, Any]
    image: dict[str, Any]
    prompt: dict[str, Any]
    end_ids: list[int]
    precision: dict[str, str]
    facts: dict[str, Any] = field(repr=False)


def read_package(path: str | os.PathLike[str]) -> Package:
    """Read ``device.json`` and check that the files it lists are there and whole.

    Sizes are compared; checksums are `visionzip inspect`'s, since reading all weights takes as long as loading them.

    Raises:
        FileNotFoundError: when there is nothing.
        ValueError: for a directory of something else, or a file that is missing, truncated or not what it says it is.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    file = place / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{path} is not an ONNX export (no {MANIFEST} in it); write one with: visionzip export … --format onnx --out {path}"
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise ValueError(f"{file} says it is {found!r}; expected {FORMAT!r}")
    try:
        package = Package(place, **{name: facts[name] for name in FIELDS}, facts=facts)
        names = [package.language["file"], *(entry["file"] for entry in package.budgets.values())]
        checks(package)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}. Export it again") from error
    unlisted = [name for name in (*names, TOKENIZER) if name not in facts["files"]]
    if unlisted:
        raise ValueError(f"{file} names {unlisted[0]} but does not list it among its files. Export it again")
    for name, entry in facts["files"].items():
        check_size(place, str(name), entry)
    return package


FIELDS = ("budgets", "default", "language", "image", "prompt", "end_ids", "precision")


def checks(package: Package) -> None:
    """Raise for values of the wrong kind, before anything is computed from them."""
    for name in ("layers", "kv_heads", "head_dim", "hidden", "limit"):
        if not isinstance(package.language[name], int) or package.language[name] < 1:
            raise TypeError(f"language.{name} is {package.language[name]!r}")
    for name, entry in package.budgets.items():
        if not isinstance(entry["tokens"], int) or entry["tokens"] < 1:
            raise TypeError(f"budgets.{name}.tokens is {entry['tokens']!r}")
    if package.default not in package.budgets:
        raise KeyError(f"default is {package.default!r}, which is none of its budgets")
    if not all(isinstance(token, int) for token in package.end_ids) or not package.facts["files"]:
        raise TypeError("end_ids or files")


def check_size(place: Path, name: str, entry: Any) -> None:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{place / MANIFEST} names the file {name!r}; only files beside it are read")
    file = place / name
    if not file.is_file():
        raise ValueError(f"{place}: {name} is missing. Export or copy it again")
    expected = entry.get("bytes") if isinstance(entry, dict) else None
    if file.stat().st_size != expected:
        raise ValueError(
            f"{place}: {name} has {file.stat().st_size:,} bytes; expected {expected}. Export or copy it again"
        )
