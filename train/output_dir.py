"""The run directory: it can be written, and no other run is writing into it."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import IO

from train.config import RunConfig, to_yaml
from train.ending import Exit, RunEnded

logger = logging.getLogger(__name__)
_claimed: dict[Path, IO[str]] = {}  # by `claim`, as long as the process lives


def make_output_dir(config: RunConfig, rank: int) -> None:
    """Rank 0 makes sure, before anything else is done, that results can be written.

    Raises:
        RunEnded: when they can't.
    """
    if rank != 0:
        return
    try:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder)
        (folder / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise RunEnded(
            Exit.STORAGE, f"output_dir {config.output_dir} can't be written: {error.strerror or error}"
        ) from error


def claim(folder: Path) -> None:
    """Hold `folder` for this process as long as it lives: two runs in one would delete each other's checkpoints.

    A POSIX lock: killed processes lose it, forked ones (workers) don't inherit it. File systems without locks go unguarded.

    Raises:
        RunEnded: when another run holds it.
    """
    _claimed[folder] = file = open(folder / ".running", "a+")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RunEnded(
            Exit.CONFIG, f"another run is writing into {folder}; wait for its end, or set another output_dir"
        ) from error
    except OSError:
        logger.warning("%s is on a file system without locks: nothing stops a second run from writing into it", folder)
