"""Tensors by content key on disk: checksummed files that any number of processes write, each its own, read through memory maps.

A shard is written under a hidden name and renamed when it is whole:

    magic · entries, each at a multiple of 64 bytes · rows · names · layouts (JSON) · tail (where these are, SHA-256 of them)

An entry is the bytes of some tensors; its row says where they are and their CRC-32, its layout (few distinct ones) what they are.
The tail also says which cache the shard belongs to (`MadeFor`).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.storage import open_part, part_path, remove_leftovers

SUFFIX = ".tokens"
SHARD_BYTES = 256 << 20
MAGIC = b"VZTOKEN2"
ALIGN = 64
# Start of rows, number of rows, number of names, bytes of layouts, SHA-256 of all these, digest of the cache, magic.
_TAIL = struct.Struct("<QQQQ32s32s8s")
_KEY = [("hi", "<u8"), ("lo", "<u8")]
ROW = np.dtype([*_KEY, ("offset", "<u8"), ("bytes", "<u8"), ("layout", "<u4"), ("crc", "<u4")])
NAME = np.dtype([*_KEY, ("key_hi", "<u8"), ("key_lo", "<u8"), ("size", "<i8"), ("changed", "<i8")])

Key = tuple[int, int]
#: What an entry holds: any JSON (``about``) and named tensors.
Entry = tuple[Any, dict[str, Tensor]]


class Damaged(ValueError):
    """Bytes that do not match their checksum; the message names the file."""


class ForeignShard(ValueError):
    """A shard of another cache; the message names the file and what it was made for."""


class MadeFor(NamedTuple):
    """Which cache a shard belongs to. `digest`: SHA-256 of the cache's manifest, 32 bytes; `summary`: the manifest in short."""

    digest: bytes = bytes(32)
    summary: str = "a folder without a manifest"


def made_for(manifest: Path) -> MadeFor:
    """What shards beside this JSON file have to name. Raises `ValueError` where it can't be read as JSON."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return MadeFor()
    except ValueError as error:
        raise ValueError(f"{manifest} is damaged ({error}); delete the folder and make it again") from None
    canonical = json.dumps(content, sort_keys=True).encode()
    short = {key: content[key] for key in ("zip", "settings", "dtype") if key in content}
    return MadeFor(hashlib.sha256(canonical).digest(), ", ".join(_flat(short)))


def _flat(content: Any, prefix: str = "") -> list[str]:
    """`zip.dominant=54` …"""
    if not isinstance(content, dict):
        return [f"{prefix}={content}"]
    return [text for key, value in content.items() for text in _flat(value, f"{prefix}.{key}" if prefix else key)]


def key_of(*parts: bytes) -> Key:
    """128 bits of SHA-256 over the parts, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:16], "little")


class Writer:
    """Appends entries; starts a new shard when one is full. What was not closed is not there.

    Shards that killed writers left unfinished in the folder are removed with the first entry.

    Raises:
        OSError: from `add`, `name` and `close`, when the disk is full. The unfinished shard is removed.
    """

    def __init__(self, folder: Path, cache: MadeFor = MadeFor(), shard_bytes: int = SHARD_BYTES) -> None:  # noqa: B008
        self.folder, self.cache, self.shard_bytes = folder, cache, shard_bytes
        self.written: list[Path] = []
        self._file: Any = None

    def add(self, key: Key, about: Any, tensors: dict[str, Tensor]) -> None:
        """`about` and the tensors' shapes should repeat themselves: every distinct combination is kept once a shard."""
        layout = json.dumps([about, [[name, list(t.shape), str(t.dtype)[6:]] for name, t in tensors.items()]])
        raw = b"".join(_bytes(tensor) for tensor in tensors.values())
        try:
            file = self._open()
            file.write(b"\0" * (-file.tell() % ALIGN))
            number = self._layouts.setdefault(layout, len(self._layouts))
            self._rows.append((*key, file.tell(), len(raw), number, zlib.crc32(raw)))
            file.write(raw)
        except OSError as error:
            self.abandon(error)
            raise
        if file.tell() >= self.shard_bytes:
            self.close()

    def name(self, name: Key, key: Key, size: int, changed: int) -> None:
        """Let `name` stand for an entry; `size` and `changed` (ns) tell later whether the file is still the same."""
        self._open()
        self._names.append((*name, *key, size, changed))

    def _open(self) -> Any:
        if self._file is None:
            if not self.written:
                remove_leftovers(self.folder)
            stem = f"{time.time_ns():019d}-{socket.gethostname()[:32]}-{os.getpid()}"
            self._final = self.folder / f"{stem}{SUFFIX}"
            self._file = open_part(self._final)
            self._file.write(MAGIC)
            self._rows: list[tuple] = []
            self._names: list[tuple] = []
            self._layouts: dict[str, int] = {}
        return self._file

    def close(self) -> None:
        """Make what was added visible."""
        if self._file is None:
            return
        try:
            self._file.write(self._footer())
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(part_path(self._final), self._final)
        except OSError as error:
            self.abandon(error)
            raise
        file, self._file = self._file, None
        file.close()
        self.written.append(self._final)

    def _footer(self) -> bytes:
        filling = b"\0" * (-self._file.tell() % ALIGN)
        start = self._file.tell() + len(filling)
        about = json.dumps({"made_for": self.cache.summary, "layouts": list(self._layouts)}).encode()
        rows, names = np.array(self._rows, ROW), np.array(self._names, NAME)
        tables = rows.tobytes() + names.tobytes() + about
        digest = hashlib.sha256(tables + self.cache.digest).digest()
        return filling + tables + _TAIL.pack(start, len(rows), len(names), len(about), digest, self.cache.digest, MAGIC)

    def abandon(self, error: OSError | None = None) -> None:
        """Remove the shard that is being written; `error`, if it is why, gets its name."""
        if self._file is not None:
            if error is not None and error.filename is None:
                error.filename = str(self._final)
            file, self._file = self._file, None
            part_path(self._final).unlink(missing_ok=True)
            with suppress(OSError):  # what is left in the buffer does not fit either
                file.close()


class Shard:
    """A finished shard, memory-mapped. Raises `Damaged` when its footer is not what was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(MAGIC) + _TAIL.size:
                raise Damaged(f"{path} has {size} bytes; it is truncated")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, rows, names, layouts, digest, self.cache, magic = _TAIL.unpack(self.map[-_TAIL.size :])
        length = rows * ROW.itemsize + names * NAME.itemsize + layouts
        if magic != MAGIC or start + length + _TAIL.size != size:
            raise Damaged(f"{path} does not end as a shard does; it was truncated or overwritten")
        with memoryview(self.map)[start : start + length] as footer:
            if hashlib.sha256(bytes(footer) + self.cache).digest() != digest:
                raise Damaged(f"{path}: its table does not match its checksum")
        # Views of the file: a reader of ten million entries holds none of their rows.
        self.rows = np.frombuffer(self.map, ROW, rows, offset=start)
        self.names = np.frombuffer(self.map, NAME, names, offset=start + rows * ROW.itemsize)
        about = json.loads(self.map[start + length - layouts : start + length])
        self.summary: str = about["made_for"]
        self.layouts = [json.loads(layout) for layout in about["layouts"]]

    def read(self, offset: int, length: int, layout: int, crc: int) -> Entry:
        raw = bytearray(memoryview(self.map)[offset : offset + length])
        if len(raw) != length or zlib.crc32(raw) != crc:
            raise Damaged(f"{self.path}: the entry at byte {offset} does not match its checksum")
        about, described = self.layouts[layout]
        tensors, at = {}, 0
        for name, shape, kind in described:
            dtype = getattr(torch, kind)
            count = int(np.prod(shape))
            tensors[name] = (
                torch.frombuffer(raw, dtype=dtype, count=count, offset=at).view(shape)
                if count
                else torch.empty(shape, dtype=dtype)
            )
            at += count * dtype.itemsize
        return about, tensors


def tail_of(path: Path) -> bytes:
    """A shard's last bytes, which differ from those of every other shard; fewer where the file is cut short."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL.size))
        return file.read()


def check_belongs(path: Path, tail: bytes, cache: MadeFor) -> None:
    """Raise `ForeignShard` where the shard at `path` is whole and of another cache. `tail`: its `tail_of`."""
    if len(tail) < _TAIL.size or _TAIL.unpack(tail)[5] == cache.digest:
        return
    try:
        shard = Shard(path)
    except (Damaged, OSError):
        return  # whoever reads it will see
    if shard.cache != cache.digest:
        raise ForeignShard(
            f"{path} belongs to another cache. It was made for: {shard.summary}; this one contains: {cache.summary}. "
            "Remove the file from the folder"
        )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
