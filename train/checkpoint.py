"""Checkpoints on disk: written aside, checked by checksum, renamed when complete.

    checkpoint-120/
        tensors-00000.safetensors   float32 weights and moments of what is trained, by name (train/state.py)
        random.safetensors          random states of every rank
        trainer_state.json          the Trainer's step, epoch and log history
        progress.json               step counts, schedule, data position, what the run was
        manifest.json               size and SHA-256 of each of these, and of itself

Only rank 0 writes and only rank 0 reads: no shared file system is needed, and a checkpoint does not depend on how many
processes there are. A directory that is called `checkpoint-N` is complete unless it was changed afterwards; while it is
written or deleted its name starts with a dot. A checkpoint is exactly the files that its manifest lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from visionzip.export.files import sync
from visionzip.manifest import digest_of, find_problems

NAME = re.compile(r"^checkpoint-(\d+)$")
MANIFEST = "manifest.json"
FORMAT = "visionzip-checkpoint/1"
SHARD_BYTES = 1 << 30


class CheckpointError(ValueError):
    """A checkpoint is incomplete or damaged; the message names it and says what is wrong."""


class Writer:
    """Writes the files of one checkpoint into a hidden directory; `commit` renames it, so that it appears complete.

    Raises:
        OSError: when the disk is full or the directory can't be written; nothing is left then.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], step: int, after_shard: Callable[[], None] = lambda: None
    ) -> None:
        self.final = Path(output_dir) / f"checkpoint-{step}"
        self.aside = Path(output_dir) / f".writing-checkpoint-{step}"
        self._after_shard = after_shard
        self._files: dict[str, dict[str, Any]] = {}
        self._pending: dict[str, Tensor] = {}
        self._shards = 0
        shutil.rmtree(self.aside, ignore_errors=True)
        self.aside.mkdir(parents=True)

    def tensor(self, name: str, value: Tensor) -> None:
        self._pending[name] = value.contiguous()
        if sum(t.numel() * t.element_size() for t in self._pending.values()) >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self.file(f"tensors-{self._shards:05d}.safetensors", save(self._pending))
            self._shards += 1
            self._pending = {}
            self._after_shard()

    def file(self, name: str, content: bytes) -> None:
        write_through(self.aside / name, content)
        self._files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def json(self, name: str, content: Any) -> None:
        self.file(name, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    def commit(self) -> Path:
        self._flush()
        manifest: dict[str, Any] = {"format": FORMAT, "files": self._files}
        manifest["sha256"] = digest_of(manifest)
        write_through(self.aside / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        sync(self.aside)
        if (
            self.final.exists()
        ):  # damaged, or left over: this run started from an older checkpoint, or from the beginning
            discard(self.final)
        os.rename(self.aside, self.final)
        sync(self.final.parent)
        return self.final

    def abandon(self) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)


def write_through(path: Path, content: bytes) -> None:
    """Write and make sure it has reached the disk: a rename is worth nothing if the content can still be lost."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def discard(path: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves nothing that looks like one."""
    hidden = path.with_name(f".deleting-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def step_of(path: Path) -> int:
    """The N of `checkpoint-N`."""
    return int(path.name.rsplit("-", 1)[1])


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Directories called `checkpoint-N`, oldest first. Their content is not read."""
    root = Path(output_dir)
    found = [p for p in root.iterdir() if NAME.match(p.name) and p.is_dir()] if root.is_dir() else []
    return sorted(found, key=step_of)


def rotate(output_dir: str | os.PathLike[str], newest: int, keep: int | None) -> None:
    """Delete the oldest checkpoints until `keep` are left; None keeps all.

    Args:
        newest: the step that was just saved. Checkpoints of later steps are left over from before this run started from an
            older one, or anew. They go too: as the newest ones they would push this run's own out, and be resumed from.
    """
    for path in list_checkpoints(output_dir):
        if step_of(path) > newest:
            discard(path)
    if keep is not None:
        for path in list_checkpoints(output_dir)[: -max(keep, 1)]:
            discard(path)


def remove_leftovers(output_dir: str | os.PathLike[str]) -> None:
    """Remove what a killed run was writing or deleting."""
    for path in Path(output_dir).glob(".writing-checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in Path(output_dir).glob(".deleting-checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest and compare the directory with it: the names of its files, their sizes and their SHA-256.

    Returns:
        The manifest.

    Raises:
        CheckpointError: a file is missing, cut short or changed, or there is one that the manifest does not list.
    """
    root = Path(path)
    try:
        manifest = json.loads((root / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{root}: format {manifest['format']!r}; expected {FORMAT!r}")
    except FileNotFoundError:
        raise CheckpointError(f"{root}: there is no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{root}: {MANIFEST} can't be read ({type(error).__name__})") from None
    try:
        problems = find_problems(root, manifest, MANIFEST)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{root}: {MANIFEST} can't be read ({type(error).__name__})") from None
    if problems:
        raise CheckpointError(f"{root}: {'; '.join(problems)}")
    return manifest


def find_newest_complete(output_dir: str | os.PathLike[str], warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is complete; `warn` is called for every one that is skipped."""
    for path in reversed(list_checkpoints(output_dir)):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            warn(f"skipping a damaged checkpoint: {error}")
    return None


class Reader:
    """The content of a checkpoint, of the files in its manifest alone.

    Raises:
        CheckpointError: as `verify`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        files = verify(path)["files"]
        self.progress: dict[str, Any] = json.loads((self.path / "progress.json").read_text())
        self.trainer_state: str = (self.path / "trainer_state.json").read_text()
        shards = [
            safe_open(str(self.path / name), framework="pt") for name in sorted(files) if name.startswith("tensors-")
        ]
        self._shard_of = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(shard.get_slice(name).get_shape()) for name, shard in self._shard_of.items()}

    def tensor(self, name: str) -> Tensor:
        return self._shard_of[name].get_tensor(name)

    def random_states(self) -> dict[str, Tensor]:
        with safe_open(str(self.path / "random.safetensors"), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def as_bytes(tensors: dict[str, Tensor]) -> bytes:
    return save({name: value.contiguous() for name, value in tensors.items()})
