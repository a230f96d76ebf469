"""DeepSpeed compiles its extensions when they are first used. How they are built must not depend on how a run was started, and a
run that was killed while it built them must not stop the next one.

torch guards a build with a file that exists while the build runs. A killed process leaves it behind, and every later one
waits for it forever. Here extensions are built before DeepSpeed asks for them, by one process at a time; whoever has the
lock, which goes with its process, knows that such a file means nothing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from train.ending import Exit, RunEnded


def prepare_extensions() -> None:
    """Before DeepSpeed is imported: where its extensions are kept, and by which ninja they are built.

    TORCH_EXTENSIONS_DIR goes first. The default is a folder for each version of torch, DeepSpeed and Python, since another version
    builds all of them again, and for each kind of processor, since they are built with ``-march=native``: nodes that share a
    home need not be alike.
    """
    if find_spec("deepspeed") is None:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionzip-ft" / "extensions"
    versions = (
        f"torch-{torch.__version__}-deepspeed-{version('deepspeed')}-python-{sys.version_info[0]}.{sys.version_info[1]}"
    )
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / f"{versions}-{describe_cpu()}"))
    use_own_ninja()


def build_extensions(deepspeed: dict[str, Any]) -> None:
    """Build what a run with this DeepSpeed config uses, or load it where it is built.

    Raises:
        RunEnded: when the folder can't be locked or written.
    """
    prepare_extensions()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__ as compatible

    names = ["ShareMemCommBuilder"] if get_accelerator().device_name() == "cpu" else []
    if (deepspeed.get("zero_optimization") or {}).get("offload_optimizer"):
        names.append("CPUAdamBuilder")
    builders = [get_accelerator().create_op_builder(name) for name in names]
    build_one_at_a_time(builder for builder in builders if builder is not None and compatible.get(builder.NAME))


def build_one_at_a_time(builders: Iterable[Any]) -> None:
    """Load extensions by their builders (``name``, ``load``); DeepSpeed keeps what was loaded, and does not ask torch again."""
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "build.lock"):
            for builder in builders:
                (folder / builder.name / "lock").unlink(missing_ok=True)
                builder.load(verbose=False)
    except (OSError, NotImplementedError) as error:
        raise RunEnded(
            Exit.STORAGE,
            f"{folder} can't be locked or written ({error}); set TORCH_EXTENSIONS_DIR to a folder on a local disk",
        ) from error


def describe_cpu(told: Path = Path("/proc/cpuinfo")) -> str:
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
