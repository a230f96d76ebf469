"""The run directory: it can be written, no other run is writing into it, and a start that fails leaves nothing in it."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from train.ending import Exit, RunEnded

logger = logging.getLogger(__name__)
LOCK = ".running"


@contextmanager
def claim_output_dir(folder: Path, rank: int) -> Iterator[None]:
    """Rank 0 holds `folder` while the block runs, and makes sure before anything expensive that results can be written.

    Where the block leaves nothing in a folder that was not there before, the folder goes again.

    Raises:
        RunEnded: it can't be written, or another run is writing into it.
    """
    if rank != 0:
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
    except OSError as error:
        raise RunEnded(Exit.STORAGE, f"output_dir {folder} can't be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.close()
        if made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def take_lock(folder: Path) -> IO[str]:
    """Two runs in one directory would delete each other's checkpoints.

    A POSIX lock on an open file: killed processes lose it, forked ones (workers) don't inherit it. File systems without locks go
    unguarded.

    Raises:
        RunEnded: when another run holds it.
    """
    path = folder / LOCK
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise RunEnded(
                Exit.CONFIG, f"another run is writing into {folder}; wait until it ends, or set another output_dir"
            ) from error
        except OSError:
            logger.warning(
                "%s is on a file system without locks: nothing stops a second run from writing into it", folder
            )
            return file
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # its holder removed it between our opening and locking it
