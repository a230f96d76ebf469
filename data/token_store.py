"""Tensors by content key on disk: checksummed shards that any number of processes append to, read through memory maps.

A shard is written under a hidden name and renamed when it is whole:

    magic · entries, each at a multiple of 64 bytes · rows · names · layouts (JSON) · tail (where these are, SHA-256 of them)

An entry is the bytes of some tensors; its row says where they are and their CRC-32, its layout (few distinct ones) what they are.
Where a key stands in several shards the youngest one counts: a damaged entry is replaced by writing it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import socket
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

logger = logging.getLogger(__name__)

SUFFIX = ".tokens"
SHARD_BYTES = 256 << 20
MAGIC = b"VZTOKEN1"
ALIGN = 64
_TAIL = struct.Struct("<QQQQ32s8s")  # start of rows, number of rows, number of names, bytes of layouts, SHA-256, magic
_KEY = [("hi", "<u8"), ("lo", "<u8")]
ROW = np.dtype([*_KEY, ("offset", "<u8"), ("bytes", "<u8"), ("layout", "<u4"), ("crc", "<u4")])
NAME = np.dtype([*_KEY, ("key_hi", "<u8"), ("key_lo", "<u8"), ("size", "<i8"), ("changed", "<i8")])
INDEXED = np.dtype([*ROW.descr, ("shard", "<u4"), ("_", "<u4")])

Key = tuple[int, int]
#: What an entry holds: any JSON (``about``) and named tensors.
Entry = tuple[Any, dict[str, Tensor]]


class Damaged(ValueError):
    """Bytes that do not match their checksum; the message names the file."""


def key_of(*parts: bytes) -> Key:
    """128 bits of SHA-256 over the parts, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:16], "little")


class Writer:
    """Appends entries; starts a new shard when one is full. What was not closed is not there."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.written: list[Path] = []
        self._file: Any = None

    def add(self, key: Key, about: Any, tensors: dict[str, Tensor]) -> None:
        """`about` and the tensors' shapes should repeat themselves: every distinct combination is kept once a shard."""
        layout = json.dumps([about, [[name, list(t.shape), str(t.dtype)[6:]] for name, t in tensors.items()]])
        raw = b"".join(_bytes(tensor) for tensor in tensors.values())
        file = self._open()
        file.write(b"\0" * (-file.tell() % ALIGN))
        number = self._layouts.setdefault(layout, len(self._layouts))
        self._rows.append((*key, file.tell(), len(raw), number, zlib.crc32(raw)))
        file.write(raw)
        if file.tell() >= self.shard_bytes:
            self.close()

    def name(self, name: Key, key: Key, size: int, changed: int) -> None:
        """Let `name` stand for an entry; `size` and `changed` (ns) tell later whether the file is still the same."""
        self._open()
        self._names.append((*name, *key, size, changed))

    def _open(self) -> Any:
        if self._file is None:
            stem = f"{time.time_ns():019d}-{socket.gethostname()[:32]}-{os.getpid()}"
            self._final = self.folder / f"{stem}{SUFFIX}"
            self._aside = self.folder / f".{stem}.part"
            self._file = open(self._aside, "wb")  # noqa: SIM115
            self._file.write(MAGIC)
            self._rows: list[tuple] = []
            self._names: list[tuple] = []
            self._layouts: dict[str, int] = {}
        return self._file

    def close(self) -> None:
        """Make what was added visible."""
        if self._file is None:
            return
        file, self._file = self._file, None
        file.write(b"\0" * (-file.tell() % ALIGN))
        start = file.tell()
        layouts = json.dumps(list(self._layouts)).encode()
        rows, names = np.array(self._rows, ROW), np.array(self._names, NAME)
        footer = rows.tobytes() + names.tobytes() + layouts
        digest = hashlib.sha256(footer).digest()
        file.write(footer + _TAIL.pack(start, len(rows), len(names), len(layouts), digest, MAGIC))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(self._aside, self._final)
        self.written.append(self._final)

    def abandon(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._aside.unlink(missing_ok=True)


class Shard:
    """A finished shard, memory-mapped. Raises `Damaged` when its footer is not what was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(MAGIC) + _TAIL.size:
                raise Damaged(f"{path} has {size} bytes; it was cut short")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, rows, names, layouts, digest, magic = _TAIL.unpack(self.map[-_TAIL.size :])
        length = rows * ROW.itemsize + names * NAME.itemsize + layouts
        if magic != MAGIC or start + length + _TAIL.size != size:
            raise Damaged(f"{path} does not end as a shard does; it was cut short or overwritten")
        with memoryview(self.map)[start : start + length] as footer:
            if hashlib.sha256(footer).digest() != digest:
                raise Damaged(f"{path}: its table does not match its checksum")
        # Views of the file: a reader of ten million entries holds none of their rows.
        self.rows = np.frombuffer(self.map, ROW, rows, offset=start)
        self.names = np.frombuffer(self.map, NAME, names, offset=start + rows * ROW.itemsize)
        texts = json.loads(self.map[start + length - layouts : start + length])
        self.layouts = [json.loads(layout) for layout in texts]

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


class Store:
    """All shards of a folder behind one sorted index, which lies on disk and is mapped: no process holds it in memory.

    Pickles as its path, so that workers open it for themselves.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.damaged: list[str] = []
        self.paths = sorted(self.folder.glob(f"*{SUFFIX}"))
        digest = hashlib.sha256(
            json.dumps([(path.name, path.stat().st_size) for path in self.paths]).encode()
        ).hexdigest()[:16]
        self._shards: dict[int, Shard] = {}
        self.rows, self.names = self._index(f"index-{digest}")

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, key: Key) -> bool:
        return _find(self.rows, key) is not None

    def get(self, key: Key) -> Entry | None:
        """The entry, its checksum verified; None where there is none. Raises `Damaged`."""
        row = _find(self.rows, key)
        if row is None:
            return None
        number = int(row["shard"])
        shard = self._shards.get(number)
        if shard is None:
            shard = self._shards[number] = Shard(self.paths[number])
        return shard.read(int(row["offset"]), int(row["bytes"]), int(row["layout"]), int(row["crc"]))

    def named(self, name: Key) -> tuple[Key, int, int] | None:
        """(key, size, changed) that `name` was written with."""
        row = _find(self.names, name)
        return (
            None if row is None else ((int(row["key_hi"]), int(row["key_lo"])), int(row["size"]), int(row["changed"]))
        )

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]

    def _index(self, stem: str) -> tuple[np.ndarray, np.ndarray]:
        files = [self.folder / f"{stem}.{part}.npy" for part in ("rows", "names")]
        with contextlib.suppress(OSError, ValueError):
            return _mapped(files[0]), _mapped(files[1])
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(Timeout, OSError, NotImplementedError):
                stack.enter_context(FileLock(self.folder / ".index.lock", timeout=600))
            with contextlib.suppress(OSError, ValueError):
                return _mapped(files[0]), _mapped(files[1])
            tables = self._merge()
            with contextlib.suppress(OSError):  # a folder that can't be written: every process keeps its own
                for file, rows in zip(files, tables, strict=True):
                    aside = file.with_name(f".{file.name}.{os.getpid()}")
                    with open(aside, "wb") as opened:
                        np.save(opened, rows)
                    os.replace(aside, file)
                if not self.damaged:
                    for old in self.folder.glob("index-*.npy"):
                        if old not in files:
                            old.unlink(missing_ok=True)
                return _mapped(files[0]), _mapped(files[1])
        return tables

    def _merge(self) -> tuple[np.ndarray, np.ndarray]:
        rows, names = [np.empty(0, INDEXED)], [np.empty(0, NAME)]
        for number, path in enumerate(self.paths):
            try:
                shard = Shard(path)
            except (Damaged, OSError) as error:
                self.damaged.append(str(error))
                logger.warning("%s; what it holds will be computed again", error)
                continue
            found = np.zeros(len(shard.rows), INDEXED)
            for column in ROW.names or ():
                found[column] = shard.rows[column]
            found["shard"] = number
            rows.append(found)
            names.append(shard.names)
        return _youngest(np.concatenate(rows)), _youngest(np.concatenate(names))


def _youngest(rows: np.ndarray) -> np.ndarray:
    """Sorted by key; of equal keys the last, which is the one of the youngest shard."""
    rows = rows[np.lexsort((np.arange(len(rows)), rows["lo"], rows["hi"]))]
    same = (rows["hi"][1:] == rows["hi"][:-1]) & (rows["lo"][1:] == rows["lo"][:-1])
    return rows[np.append(~same, True)] if len(rows) else rows


def _find(rows: np.ndarray, key: Key) -> Any:
    """The row with this key. Keys are hashes, hence spread evenly: a few pages of the map are touched."""
    at = int(np.searchsorted(rows["hi"], np.uint64(key[0])))
    while at < len(rows) and rows[at]["hi"] == key[0]:
        if rows[at]["lo"] == key[1]:
            return rows[at]
        at += 1
    return None


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
