"""Where records are stored: JSON files, and whatever `datasets` reads. Each gives record `i` on demand, and keeps none."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from data.config import SourceConfig
from data.index import cache_folder, hash_file, index_json
from data.sample import Reject

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


class Records(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Any:
        """The record as stored. Raises `Reject` where it can't be read."""


class JsonRecords:
    """Records of a JSON array or JSON Lines file, read one at a time at the offsets of an index on disk."""

    def __init__(self, path: str, cache_dir: str | None) -> None:
        self.path = os.path.abspath(path)
        self.spans = index_json(self.path, cache_folder(cache_dir))
        self._fd = os.open(self.path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, position: int) -> Any:
        start, end = self.spans[position]
        raw = os.pread(self._fd, end - start, start)
        try:
            return json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Reject("not UTF-8", f"byte {start + error.start} of the file: {error.reason}") from error
        except (ValueError, RecursionError) as error:
            raise Reject("broken JSON", f"at byte {start} of the file: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_fd"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fd = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def open_records(source: SourceConfig, cache_dir: str | None) -> Records:
    """The records of a source. Raises `ValueError` or `FileNotFoundError` saying what was looked for."""
    if reader_of(source) == "json":
        return open_json(source, cache_dir)
    from data.hf import HFRecords  # here: `datasets` takes a second to import

    return HFRecords(source)


def open_json(source: SourceConfig, cache_dir: str | None) -> JsonRecords:
    if not os.path.isfile(source.path):
        raise FileNotFoundError(f"data source {source.label!r}: there is no file {os.path.abspath(source.path)}")
    return JsonRecords(source.path, cache_dir)


def reader_of(source: SourceConfig) -> str:
    if source.reader != "auto":
        return source.reader
    return "json" if source.path.lower().endswith(JSON_SUFFIXES) else "datasets"


def image_root(source: SourceConfig) -> str:
    """The absolute folder that relative paths of the source's records are in."""
    if source.images:
        return os.path.abspath(source.images)
    path = Path(source.path)
    if path.is_dir():
        return os.path.abspath(path)
    return os.path.abspath(path.parent) if path.is_file() else os.getcwd()


SAMPLED = 64
"""Places of a large file that `content_digest` looks at, 64 KB each."""


def content_digest(sources: Sequence[SourceConfig], cache_dir: str | None = None) -> str:
    """64 hex digits that change when the records of `sources` do, wherever and under whatever name their files lie.

    A JSON file counts with all its bytes, which its index has hashed already. Other local files (Parquet, Arrow, CSV, a folder's)
    count whole up to 4 MB, above that with their size and `SAMPLED` places; a data set of the hub with the files that `datasets`
    keeps of it, a streamed one with its name, subset and split alone. Image files are not read.

    Raises:
        ValueError, FileNotFoundError: for a source that can't be opened.
    """
    digest = hashlib.sha256()
    for source in sources:
        for part in _digests(source, cache_dir):
            digest.update(len(part).to_bytes(8, "little") + part)
        digest.update(b"end of source")
    return digest.hexdigest()


def _digests(source: SourceConfig, cache_dir: str | None) -> Iterable[bytes]:
    if reader_of(source) == "json":
        yield open_json(source, cache_dir).spans.source_digest
        return
    path = Path(source.path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    else:
        files = [Path(file) for file in sorted(glob.glob(source.path))]
    if not files and not source.streaming:
        from data.hf import load_source

        files = sorted(Path(kept["filename"]) for kept in load_source(source).cache_files)
    if not files:
        yield json.dumps([source.path, source.subset, source.split]).encode()
    yield from map(sampled_digest, files)


def sampled_digest(path: Path) -> bytes:
    """SHA-256 of a file's size and bytes: all of up to 4 MB, else `SAMPLED` evenly spaced pieces, its ends among them."""
    size, piece = path.stat().st_size, 1 << 16
    if size <= SAMPLED * piece:
        return hash_file(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(SAMPLED):
            file.seek((size - piece) * number // (SAMPLED - 1))
            digest.update(file.read(piece))
    return digest.digest()
