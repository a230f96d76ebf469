"""A measurement in a process of its own. Imports nothing heavy: what the parent holds when it forks counts as the child's peak."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_measured(arguments: list[str], threads: int) -> tuple[str, int]:
    """Run Python with `arguments` in the repository, `threads` for OpenMP; (what it printed, peak memory in bytes).

    The peak is the operating system's (``ru_maxrss`` of ``wait4``), not a library's counter.

    Raises:
        RuntimeError: it failed; with its last lines.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        err.seek(0)
        if status:
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{err.read()[-2000:]}")
        return out.read(), int(usage.ru_maxrss * 1024)
