"""DeepSpeed compiles its extensions when they are first used. How they are built must not depend on how a run was started, and a
run that was killed while it built, or only looked, must not stop the next one.

torch guards a build with a file that exists while somebody is at it. A killed process leaves it behind, and every later one
waits for it without end. Here the kernel's own lock on that file is what counts; it goes with the process that held it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from train.ending import Exit, RunEnded


class Baton:
    """`torch.utils.file_baton.FileBaton` with a lock that does not outlive its process. For folders that no other program uses."""

    def __init__(self, lock_file_path: str, *_: object, **__: object) -> None:
        self.path = lock_file_path
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Whether it is ours now."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def wait(self) -> None:
        """Until whoever has it is done, or dead."""
        self._lock(fcntl.LOCK_EX)
        self.release()

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, how: int) -> bool:
        descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            os.close(descriptor)
            raise RunEnded(
                Exit.STORAGE,
                f"{self.path} can't be locked ({error.strerror}); set TORCH_EXTENSIONS_DIR to a folder on a local disk",
            ) from error
        self._descriptor = descriptor
        return True


def prepare_extensions() -> None:
    """Before DeepSpeed is imported: where its extensions are kept, by which ninja they are built, and what guards a build.

    TORCH_EXTENSIONS_DIR goes first. The default is a folder for each version of torch, DeepSpeed and Python, since another version
    builds all of them again, and for each kind of processor, since they are built with ``-march=native``: nodes that share a
    home need not be alike.
    """
    if find_spec("deepspeed") is None:
        return
    from torch.utils import cpp_extension

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionzip-ft" / "extensions"
    versions = (
        f"torch-{torch.__version__}-deepspeed-{version('deepspeed')}-python-{sys.version_info[0]}.{sys.version_info[1]}"
    )
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / f"{versions}-{processor()}"))
    use_own_ninja()
    cpp_extension.FileBaton = Baton  # type: ignore[misc,assignment]


def processor(told: Path = Path("/proc/cpuinfo")) -> str:
    """The machine's architecture and eight digits of what its processor can do: two that agree run the same instructions."""
    try:
        lines = told.read_text().splitlines()
    except OSError:  # not Linux
        return platform.machine()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def use_own_ninja() -> None:
    """Put the ninja installed beside this Python first, whether or not its environment is activated.

    A ninja that finds the log of another version throws it away and builds everything again, which takes minutes.
    """
    here, found = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if (Path(here) / "ninja").is_file() and found.split(os.pathsep)[0] != here:
        os.environ["PATH"] = f"{here}{os.pathsep}{found}"
