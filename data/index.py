"""Where each record of a JSON file lies, found once and kept beside it on disk.

LLaVA's mix is one JSON array of 665,000 records. Parsed, it takes gigabytes in every worker; here a worker keeps nothing but
two open files, and reads the 16 bytes that say where a record is, then the record.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from data.storage import HEADER_BYTES, DamagedFile, check_file, hash_rest, remove_leftovers, write_checked

logger = logging.getLogger(__name__)

CHUNK = 1 << 22
"""Bytes scanned at once. The scan's masks and positions take some ten times that for a moment."""
_MAGIC = b"VZIDX003"
_SHAPE = struct.Struct("<q32s")  # columns, digest of what the table was made from
_FIRST_ROW = HEADER_BYTES + _SHAPE.size
_LOCK_SECONDS = 900
_COMMA = 2
_STEPS = np.zeros(256, np.int8)  # what a byte outside of strings does to the depth, and commas
_STEPS[[ord("{"), ord("[")]], _STEPS[[ord("}"), ord("]")]], _STEPS[ord(",")] = 1, -1, _COMMA


class IndexFileError(ValueError):
    """A data file is not what its name says, or damaged so that its records can't be told apart."""


class DiskTable:
    """An int64 table (rows, columns) in a file, read a row at a time; holds no rows in memory and pickles as its path.

    Attributes:
        source_digest: SHA-256 of the file the table was made from; 32 zero bytes where it was made from none.

    Raises:
        DamagedFile: when opened by path, for a file that is not the one that was written. Whoever unpickles it (a worker) opens
            what has just been checked.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        check_file(self.path, _MAGIC)
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDONLY)
        self.columns, self.source_digest = _SHAPE.unpack(os.pread(self._fd, _SHAPE.size, HEADER_BYTES))
        self._row = struct.Struct(f"<{self.columns}q")
        self.rows = (os.fstat(self._fd).st_size - _FIRST_ROW) // self._row.size

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> tuple[int, ...]:
        if not 0 <= row < self.rows:
            raise IndexError(row)
        return self._row.unpack(os.pread(self._fd, self._row.size, _FIRST_ROW + row * self._row.size))

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.path = path
        self._open()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._fd)

    @staticmethod
    def write(path: Path, parts: Iterator[np.ndarray], columns: int, source_digest: bytes = bytes(32)) -> None:
        """Write it aside and rename it, so that no reader ever sees half a table."""
        rows = (np.ascontiguousarray(part, dtype="<i8").tobytes() for part in parts)
        write_checked(path, _MAGIC, itertools.chain([_SHAPE.pack(columns, source_digest)], rows))


def cached_table(
    folder: Path,
    name: str,
    build: Callable[[], Iterator[np.ndarray]],
    columns: int,
    source_digest: Callable[[], bytes] = lambda: bytes(32),
) -> DiskTable:
    """The table `name` of a cache folder, built by the first process that needs it while the others wait.

    A damaged one is built again, which is logged in one line.
    """
    path = folder / f"{name}.idx"
    with contextlib.suppress(FileNotFoundError, DamagedFile):
        return DiskTable(path)
    with contextlib.ExitStack() as stack:
        # Where the file system has no locks, building twice does no harm: the rename is atomic.
        with contextlib.suppress(Timeout, OSError, NotImplementedError):
            stack.enter_context(FileLock(folder / f"{name}.lock", timeout=_LOCK_SECONDS))
        try:
            return DiskTable(path)
        except FileNotFoundError:
            pass
        except DamagedFile as error:
            logger.warning("%s; rebuilding it", error)
        remove_leftovers(folder, f".{glob.escape(path.name)}.*.part")
        DiskTable.write(path, build(), columns, source_digest())
    return DiskTable(path)


def cache_folder(configured: str | None) -> Path:
    """The folder for indexes; a temporary one, gone at exit, where it can't be written."""
    base = configured or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "visionzip-ft"
    )
    folder = Path(base) / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="visionzip-ft-index-"))
        owner = os.getpid()
        atexit.register(lambda: shutil.rmtree(temporary, ignore_errors=True) if os.getpid() == owner else None)
        logger.warning(
            "%s can't be written (%s): indexing again in each process, into %s. Set data.cache_dir to keep indexes.",
            folder,
            error.strerror,
            temporary,
        )
        return temporary


def index_json(path: str, folder: Path) -> DiskTable:
    """(start, end) byte offsets of each record of a JSON array or JSON Lines file.

    Raises `IndexFileError` where the file is neither, or an array is broken (cut short, unbalanced) so that the records behind
    can't be found.
    """
    name = f"{Path(path).stem[:40]}-{file_key(path)}"
    return cached_table(folder, name, lambda: scan(path), 2, lambda: hash_file(path))


def hash_file(path: str | os.PathLike[str]) -> bytes:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hash_rest(file)


def file_key(path: str) -> str:
    """Changes when the file does: size, time of change, and its first and last 64 KB."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
        digest.update(file.read(1 << 16))
        file.seek(max(0, status.st_size - (1 << 16)))
        digest.update(file.read(1 << 16))
    return digest.hexdigest()[:24]


def scan(path: str) -> Iterator[np.ndarray]:
    """Yield (n, 2) arrays of record offsets. See `index_json`."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise IndexFileError(f"{path} is UTF-16; save it as UTF-8")
    start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    body = head[start:].lstrip()
    if not body:
        raise IndexFileError(f"{path} contains no records (it is empty)")
    if body[:1] == b"[":
        return scan_array(path, start + head[start:].index(b"["))
    lines = body.split(b"\n")[: 100 if len(head) < 1 << 16 else -1]  # the last may be cut
    lines = [line for line in lines[:100] if line.strip()]
    if sum(map(_is_json_object, lines)) < len(lines) / 2:
        raise IndexFileError(
            f"{path} is neither a JSON array of records nor JSON Lines (one record per line): it starts with {body[:60]!r}"
        )
    return scan_lines(path, start)


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def scan_lines(path: str, start: int) -> Iterator[np.ndarray]:
    """Offsets of the lines that are not blank."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(start)
        line_start = position = start
        while chunk := file.read(CHUNK):
            block = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(block == ord("\n")) + position
            starts = np.concatenate([[line_start], ends + 1])
            if len(ends):
                yield _not_blank(np.stack([starts[:-1], ends], 1), path)
            line_start = int(starts[-1])
            position += len(chunk)
        if line_start < size:
            yield _not_blank(np.array([[line_start, size]]), path)


def _not_blank(spans: np.ndarray, path: str) -> np.ndarray:
    keep = np.ones(len(spans), bool)
    with open(path, "rb") as file:
        for row in np.flatnonzero(spans[:, 1] - spans[:, 0] < 16):  # a shorter line than any record can be: look at it
            file.seek(int(spans[row, 0]))
            keep[row] = bool(file.read(int(spans[row, 1] - spans[row, 0])).strip())
    return spans[keep]


def scan_array(path: str, start: int) -> Iterator[np.ndarray]:
    """Offsets of the elements of the array that opens at byte `start`.

    Only brackets and commas outside of strings are looked at, vectorized over chunks; whether an element is sound JSON shows
    when it is read. UTF-8 has no byte of another character that looks like one of these.
    """
    depth, quoted, element = 0, False, start + 1
    with open(path, "rb") as file:
        file.seek(start)
        position = start
        while chunk := file.read(CHUNK):
            while chunk.endswith(b"\\") and (more := file.read(1)):  # never part a backslash from what it escapes
                chunk += more
            block = np.frombuffer(chunk, np.uint8)
            marks, levels, quoted = _structure(block, depth, quoted)
            bytes_ = block[marks]
            closing = np.flatnonzero((levels == 0) & (bytes_ == ord("]")))
            last = len(marks) if not len(closing) else int(closing[0]) + 1
            commas = np.flatnonzero((levels[:last] == 1) & (bytes_[:last] == ord(",")))
            ends = marks[commas] + position
            if len(closing):
                ends = np.append(ends, marks[closing[0]] + position)
            starts = np.concatenate([[element], ends + 1])
            if len(ends):
                yield _not_empty(np.stack([starts[:-1], ends], 1), path)
                element = int(starts[-1])
            if len(closing):
                _nothing_behind(path, int(marks[closing[0]]) + position + 1)
                return
            if len(levels) and levels.min() < 1:
                raise IndexFileError(f"{path}: brackets don't match near byte {position + int(marks[levels.argmin()])}")
            depth = int(levels[-1]) if len(levels) else depth
            position += len(chunk)
    raise IndexFileError(
        f"{path}: the array never ends (the file is truncated, or a quote or bracket is missing); "
        f"the last complete record starts before byte {element}. Fetch it again, or convert it to JSON Lines"
    )


def _nothing_behind(path: str, end: int) -> None:
    """Raises `IndexFileError` where anything but whitespace follows the array: a second array's records would be lost without notice."""
    with open(path, "rb") as file:
        file.seek(end)
        while chunk := file.read(CHUNK):
            if rest := chunk.lstrip():
                raise IndexFileError(
                    f"{path}: the array ends at byte {end}, but is followed by {rest[:60]!r}. Several arrays in one file, or one "
                    "per line, can't be read; join them, or write JSON Lines with one record per line"
                )


def _structure(block: np.ndarray, depth: int, quoted: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    """Positions of brackets and commas outside of strings, the depth after each, and whether the block ends in a string."""
    quotes = (block == ord('"')).view(np.uint8)
    backslashes = np.flatnonzero(block == ord("\\"))
    if len(backslashes):
        run_starts = np.flatnonzero(np.diff(backslashes, prepend=-2) != 1)
        lengths = np.diff(np.append(run_starts, len(backslashes)))
        escaped = backslashes[run_starts[lengths % 2 == 1]] + lengths[lengths % 2 == 1]
        quotes[escaped[escaped < len(quotes)]] = 0
    inside = np.bitwise_xor.accumulate(quotes) ^ np.uint8(quoted)
    steps = _STEPS[block]
    steps[inside == 1] = 0
    marks = np.flatnonzero(steps)
    moves = steps[marks].astype(np.int64)
    moves[moves == _COMMA] = 0
    return marks, depth + np.cumsum(moves), bool(inside[-1])


def _not_empty(spans: np.ndarray, path: str) -> np.ndarray:
    """Leave out the empty item between the brackets of `[]` and after a trailing comma."""
    return _not_blank(spans, path)
