"""All shards of a folder under one sorted index on disk, which is memory-mapped: no process loads it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from data.cache.shards import NAME, ROW, SUFFIX, Damaged, Entry, Key, MadeFor, Shard, check_belongs, tail_of
from data.storage import HEADER_BYTES, DamagedFile, check_file, remove_leftovers, write_checked

logger = logging.getLogger(__name__)

INDEXED = np.dtype([*ROW.descr, ("shard", "<u4"), ("_", "<u4")])
Tables = tuple[np.ndarray, np.ndarray]
_MAGIC = b"VZINDEX2"
_COUNTS = struct.Struct("<QQQ")  # rows, names, shards that could be read


class Store:
    """Entries by key. Where several shards have a key, the newest one counts: a damaged entry is replaced by writing it again.

    Pickles as its path, so that workers open it for themselves.

    Raises:
        ForeignShard: one of the shards belongs to another cache.
    """

    def __init__(self, folder: str | os.PathLike[str], cache: MadeFor = MadeFor()) -> None:  # noqa: B008
        self.folder, self.cache = Path(folder), cache
        self.paths = sorted(self.folder.glob(f"*{SUFFIX}"))
        digest = hashlib.sha256()
        for path in self.paths:
            tail = tail_of(path)
            check_belongs(path, tail, cache)
            digest.update(json.dumps([path.name, path.stat().st_size]).encode() + tail)
        self._shards: dict[int, Shard] = {}
        self.rows, self.names = self._index(self.folder / f"index-{digest.hexdigest()[:16]}.idx")

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

    def __getstate__(self) -> tuple[Path, MadeFor]:
        return self.folder, self.cache

    def __setstate__(self, state: tuple[Path, MadeFor]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _index(self, path: Path) -> Tables:
        """The index of just these shards, made by the first process that needs it while the others wait."""
        with contextlib.suppress(OSError, DamagedFile):
            return _mapped(path)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(Timeout, OSError, NotImplementedError):
                stack.enter_context(FileLock(self.folder / ".index.lock", timeout=600))
            try:
                return _mapped(path)
            except FileNotFoundError:
                pass
            except (OSError, DamagedFile) as error:
                logger.warning("%s; rebuilding it from the shards", error)
            tables, unreadable = self._merge()
            with contextlib.suppress(OSError):  # a folder that can't be written: every process keeps its own
                remove_leftovers(self.folder, ".index-*.part")
                rows, names = tables
                counts = _COUNTS.pack(len(rows), len(names), len(self.paths) - unreadable)
                write_checked(path, _MAGIC, [counts, rows.tobytes(), names.tobytes()])
                if not unreadable:
                    for old in self.folder.glob("index-*"):
                        if old != path:
                            old.unlink(missing_ok=True)
                return _mapped(path)
        return tables

    def _merge(self) -> tuple[Tables, int]:
        """Rows and names of all shards, sorted, and how many shards could not be read."""
        rows, names, unreadable = [np.empty(0, INDEXED)], [np.empty(0, NAME)], 0
        for number, path in enumerate(self.paths):
            try:
                shard = Shard(path)
            except (Damaged, OSError) as error:
                unreadable += 1
                logger.warning("%s; its contents will be recomputed", error)
                continue
            found = np.zeros(len(shard.rows), INDEXED)
            for column in ROW.names or ():
                found[column] = shard.rows[column]
            found["shard"] = number
            rows.append(found)
            names.append(shard.names)
        return (_youngest(np.concatenate(rows)), _youngest(np.concatenate(names))), unreadable


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


def _mapped(path: Path) -> Tables:
    """Raises `DamagedFile`, and `FileNotFoundError` where there is none."""
    check_file(path, _MAGIC)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    rows, names, _ = _COUNTS.unpack_from(mapped, HEADER_BYTES)
    start = HEADER_BYTES + _COUNTS.size
    return (
        np.frombuffer(mapped, INDEXED, rows, offset=start),
        np.frombuffer(mapped, NAME, names, offset=start + rows * INDEXED.itemsize),
    )
