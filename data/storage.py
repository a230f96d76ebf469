"""Files that are complete whenever they are there: written under a hidden name, renamed when whole, checked by a digest.

A process that dies leaves its hidden file behind; the next one that writes into the folder removes it (`remove_leftovers`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20
_MAGIC_BYTES = 8
HEADER_BYTES = _MAGIC_BYTES + hashlib.sha256().digest_size


DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What only writing raises, or a disk that fails."""
STORAGE_ERRORS = (*DISK_ERRORS, errno.EACCES)
STORAGE_EXIT = 74
"""Exit code of every command where a file can't be written; `EX_IOERR` of sysexits.h."""


def storage_message(error: BaseException) -> str | None:
    """The one sentence about a disk that is full or can't be written; None where that is not what is wrong.

    The errors of safetensors are no OSErrors; they end in ``(os error 28)``.
    """
    if isinstance(error, OSError):
        number, path = error.errno, error.filename
    elif found := re.search(r"\(os error (\d+)\)", str(error) if type(error).__name__ == "SafetensorError" else ""):
        number, path = int(found[1]), None
    else:
        return None
    if number not in STORAGE_ERRORS:
        return None
    where = path or "a file of this run"
    return (
        f"run ended with exit code {STORAGE_EXIT}: {where} could not be written: {os.strerror(number)}. Make room, or set another "
        "folder, and start the same command again"
    )


class DamagedFile(ValueError):
    """A file's content does not match its checksum, or it is not a file of this kind and version; the message names it."""


def part_path(path: Path) -> Path:
    """The hidden name under which this process writes what is to become `path`."""
    return path.with_name(f".{path.name}.{_this_process()}.part")


def open_part(path: Path) -> BinaryIO:
    """`part_path(path)`, open for writing and locked for as long as it is open, which is how others see that its writer lives.

    A POSIX lock: a killed process loses it, forked workers do not inherit it. File systems without locks go without.
    """
    while True:
        file = open(part_path(path), "wb")  # noqa: SIM115
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else `remove_leftovers` came between opening and locking
            return file
        file.close()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` when the block ends; after an exception nothing is left of it."""
    part = part_path(path)
    file = open_part(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)
        raise


def remove_leftovers(folder: Path, pattern: str = ".*.part") -> list[Path]:
    """Remove hidden files in `folder` whose writers are gone; returns what was removed. Those of live writers are locked."""
    removed = []
    for part in folder.glob(pattern):
        if part.name.endswith(f".{_this_process()}.part"):
            continue  # this process's own lock does not keep it out
        with suppress(OSError), open(part, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
            removed.append(part)
    return removed


def _this_process() -> str:
    return f"{socket.gethostname()[:32]}-{os.getpid()}"


def write_checked(path: Path, magic: bytes, parts: Iterable[bytes]) -> None:
    """Write `parts` one after the other after a header of `magic` (8 bytes) and their SHA-256."""
    digest = hashlib.sha256()
    with replacing(path) as file:
        file.write(magic.ljust(HEADER_BYTES, b"\0"))
        for part in parts:
            digest.update(part)
            file.write(part)
        file.seek(_MAGIC_BYTES)
        file.write(digest.digest())


def check_file(path: str | os.PathLike[str], magic: bytes) -> None:
    """Read a file of `write_checked` through once (some 1 GB/s) and compare its checksum.

    Raises:
        DamagedFile: another kind or version of file, cut short, or changed since it was written.
        OSError: as it comes.
    """
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        if head[:_MAGIC_BYTES] != magic or len(head) < HEADER_BYTES:
            raise DamagedFile(f"{os.fspath(path)} is truncated or not a file of this version")
        if hash_rest(file) != head[_MAGIC_BYTES:]:
            raise DamagedFile(f"{os.fspath(path)} does not match its checksum")


def hash_rest(file: BinaryIO) -> bytes:
    """SHA-256 of what is left of an open file."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.digest()
