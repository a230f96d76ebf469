"""Write a folder once: aside, then renamed, so that it is complete whenever it is there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_once(out: str | Path, manifest: str, wanted: dict[str, Any], fill: Callable[[Path], None]) -> bool:
    """Have `fill` write a folder and put it at `out`; True if it was written, False if it was there already.

    `wanted` are the parameters the content depends on, kept in the folder as the JSON file `manifest`. A folder of other parameters
    is replaced. Several processes may call this at once.

    Raises:
        ValueError: `out` contains something that this function did not write; it is left alone.
        OSError: as `fill` and the file system raise it; nothing is left behind.
    """
    out = Path(out).resolve()
    if _found(out, manifest) == wanted:
        return False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:  # named by what was asked for, not by the folder aside
        raise OSError(error.errno, error.strerror, str(out)) from error
    try:
        fill(aside)
        (aside / manifest).write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        aside.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        return _put(aside, out, manifest, wanted)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _found(out: Path, manifest: str) -> dict | None:
    """The parameters of the folder at `out`, or None where there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        return json.loads((out / manifest).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{out} exists and was not written by this command (no readable {manifest} in it): "
            "it was left alone; name another folder, or remove it"
        ) from None


def _put(aside: Path, out: Path, manifest: str, wanted: dict) -> bool:
    """Rename `aside` to `out`. A folder of other parameters is replaced; one with the same, written meanwhile, stays.

    Another process may do the same at any moment, so a rename that finds something changed is tried again.
    """
    replaced = aside / "replaced"
    for _ in range(100):
        found = _found(out, manifest)
        if found == wanted:
            return False
        try:
            if found is not None:
                os.rename(out, replaced)
            os.rename(aside, out)
        except OSError as problem:
            if problem.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(replaced, ignore_errors=True)
            continue
        shutil.rmtree(out / "replaced", ignore_errors=True)
        return True
    raise RuntimeError(f"{out} was changed by another process whenever it was about to be written; run this again")
