"""Reading files of unknown origin without running anything in them, and writing directories that are whole or absent."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visionzip.projector import Header

#: says what a directory holds and what it belongs to, in every format that has no room for it of its own
NOTE = "visionzip.json"


def free(out: str | os.PathLike[str], *, overwrite: bool = False, ours: bool = True) -> Path:
    """`out`, where a directory can be written: nothing is there, or it is empty, or it is an export and may be replaced.

    Args:
        overwrite: replace what is there, if it is `ours`.

    Raises:
        FileExistsError: when something else is there.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{out} is there already and not empty; choose another place, or remove it first")
        if not target.is_dir() or not ours:
            raise FileExistsError(f"{out} is no export and is not replaced; choose another place, or remove it first")
    return target


@contextmanager
def staged(out: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden directory that becomes `out` when the block ends well, and nothing when it does not.

    Raises:
        FileExistsError: as `free`.
    """
    target = free(out, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (target.with_name(f".{target.name}.{kind}.{os.getpid()}") for kind in ("new", "old"))
    try:
        aside.mkdir()
        yield aside
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``torch.save``d dict. Nothing but tensors and plain containers is made of what is read.

    Raises:
        ValueError: for a pickle that would run code, a damaged file, anything but a dict of tensors.
    """
    try:
        with warnings.catch_warnings():  # about the pickle's protocol; what is wrong is said below
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named or ("Unsupported operand" in str(error) and path.read_bytes()[:1] == pickle.PROTO):
            what = named[1] if named else "a bare pickle, of a kind torch.save does not write"
            raise ValueError(
                f"{path} is a pickle that could run code when read ({what}); nothing was run. A projector is a dict of "
                f"tensors: do not use this file"
            ) from None
        raise ValueError(f"{path} is damaged or not written by torch.save: {str(error).splitlines()[0]}") from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AssertionError,
        UnicodeDecodeError,
        AttributeError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is truncated or damaged: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        held = type(content).__name__ if not isinstance(content, dict) else "dict of something else"
        raise ValueError(f"{path} holds a {held}; expected a dict of tensors by name")
    return content


def tensors(path: Path, wanted: list[str] | None = None) -> dict[str, Tensor]:
    """Of a safetensors file all tensors, or those that are `wanted` and there.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names if wanted is None or name in wanted}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: for anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_note(directory: Path) -> dict[str, Any]:
    """The header that `write_note` left; one that says nothing where there is no note (somebody else's export).

    Raises:
        ValueError: when the note can't be read.
    """
    path = directory / NOTE
    if not path.is_file():
        return Header(format="").model_dump()
    content = read_json(path)
    try:
        return {**content, **Header.model_validate(content).model_dump()}
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def write_note(directory: Path, header: dict[str, Any], form: str, **more: Any) -> None:
    write_json(directory / NOTE, {**header, "format": f"visionzip-{form}/1", **more})
