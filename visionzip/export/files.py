"""Reading files of unknown origin without running anything in them, and writing directories that are whole or absent."""

from __future__ import annotations

import glob
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
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: says what a directory contains and what it belongs to, in formats that have no place for it themselves
NOTE = "visionzip.json"


def check_target(out: str | os.PathLike[str], *, overwrite: bool = False, is_export: bool = True) -> Path:
    """`out`, where a directory can be written: nothing is there, or it is empty, or it is an export and may be replaced.

    Args:
        overwrite: replace what is there, if it `is_export`.

    Raises:
        FileExistsError: when something else is there.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{out} already exists and is not empty; choose another path, or remove it first")
        if not target.is_dir() or not is_export:
            raise FileExistsError(
                f"{out} is not an export and will not be replaced; choose another path, or remove it first"
            )
    return target


@contextmanager
def staged(out: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden directory that becomes `out` when the block ends well, and nothing when it does not.

    What a killed writer left behind is removed; a directory that it was replacing is put back.

    Raises:
        FileExistsError: as `check_target`.
        OSError: when the disk is full or can't be written, whatever the writing library made of it.
    """
    recover(Path(out))
    target = check_target(out, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (target.with_name(f".{target.name}.{kind}.{os.getpid()}") for kind in ("new", "old"))
    try:
        with storage_errors(target):
            aside.mkdir()
            yield aside
            for path in aside.rglob("*"):
                sync(path)
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
        sync(target.parent)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Remove what dead processes of this machine left beside `target`; restore it where one died while replacing it."""
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.*")):
        found = re.fullmatch(r"(new|old|file)\.(\d+)", path.name[len(target.name) + 2 :])
        if found is None or is_running(int(found[2])):
            continue
        if found[1] == "old" and not target.exists():
            os.replace(path, target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_file(target: Path, content: bytes) -> Path:
    """Write a file under a hidden name and rename it, so that `target` is never half written.

    Raises:
        OSError: when it can't be written; `target` is as it was then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    aside = target.with_name(f".{target.name}.file.{os.getpid()}")
    try:
        with storage_errors(target):
            aside.write_bytes(content)
            sync(aside)
        os.replace(aside, target)
        sync(target.parent)
    finally:
        aside.unlink(missing_ok=True)
    return target


def sync(path: Path) -> None:
    """Make sure a file or a directory's list of files has reached the disk: a rename can get there before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """What libraries raise when the disk is full, as the ``OSError`` it was, for `target`."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from error
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(target), None  # not the hidden name it has meanwhile
        raise


def unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``torch.save``d dict. Nothing but tensors and plain containers is made of what is read.

    Raises:
        ValueError: for a pickle that would run code, a damaged file, anything but a dict of tensors.
    """
    try:
        with warnings.catch_warnings():  # about the pickle's protocol; what is wrong is reported below
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
        raise ValueError(f"{path} contains a {held}; expected a dict of tensors by name")
    return content


def read_safetensors(path: Path, wanted: list[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of a safetensors file all tensors, or those that are `wanted` and there; and its metadata.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            kept = {name: file.get_tensor(name) for name in names if wanted is None or name in wanted}
            return kept, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
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
        raise ValueError(f"{path} contains a {type(content).__name__}; expected a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_note(directory: Path) -> dict[str, Any]:
    """The stored header of an export; empty where there is none (an export of another tool).

    Raises:
        ValueError: when it is no JSON object.
    """
    path = directory / NOTE
    return read_json(path) if path.is_file() else {}
