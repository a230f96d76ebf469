"""Sizes and SHA-256 of files, as a directory's manifest lists them: ``{name: {"bytes": 12, "sha256": "…"}}``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def list_files(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The manifest's entries for `names` in `directory`."""
    return {name: {"bytes": (directory / name).stat().st_size, "sha256": hash_file(directory / name)} for name in names}


def digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over everything in a manifest but its own digest, ``sha256``."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def find_problems(directory: Path, manifest: Mapping[str, Any], name: str) -> list[str]:
    """What is wrong with a directory that contains exactly what its `manifest` (the file `name`) lists under ``files``: a manifest
    that is not what its ``sha256`` says, files that are not listed, files that are damaged. One sentence each; empty where all is well.

    Raises:
        KeyError, TypeError: when the manifest has no such entries.
    """
    if manifest["sha256"] != digest_of(manifest):
        return [f"{name} was changed after it was written"]  # what it lists says nothing then
    files = dict(manifest["files"])
    added = sorted(path.name for path in directory.iterdir() if path.name not in {name, *files})
    unlisted = [f"{', '.join(added)} is not listed in {name}; remove what does not belong to it"] if added else []
    return unlisted + find_damage(directory, files)


def find_damage(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each listed file that is missing, cut off or changed; empty where all are as listed.

    Raises:
        KeyError, TypeError: when an entry is not of the form above.
    """
    found = []
    for name, entry in files.items():
        file = directory / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            found.append(f"{name} has {file.stat().st_size:,} bytes; expected {entry['bytes']:,}")
        elif hash_file(file) != entry["sha256"]:
            found.append(f"{name} was changed after it was written (its checksum differs)")
    return found


def hash_file(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    total = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            total.update(piece)
    return total.hexdigest()
