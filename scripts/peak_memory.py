"""Peak memory of a command with all its processes: the largest sum of their proportional set sizes, sampled twice a second.

    python -m scripts.peak_memory make real

Proportional: memory that several processes share (weights mapped from one file, forked readers) counts once. Linux only. Ends with the command's exit code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EVERY = 0.5


def children_of(process: int) -> list[int]:
    """`process` and all its descendants; those that ended meanwhile are left out."""
    found = [process]
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [each for child in path.read_text().split() for each in children_of(int(child))]
        except OSError:
            continue
    return found


def proportional_set_size(process: int) -> int:
    """Bytes; 0 for a process that ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def run(command: Sequence[str]) -> tuple[int, int]:
    """Exit code, and peak memory in bytes."""
    peak = 0
    with subprocess.Popen(command) as running:
        while running.poll() is None:
            peak = max(peak, sum(map(proportional_set_size, children_of(running.pid))))
            time.sleep(EVERY)
    return running.returncode, peak


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts.peak_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    command = parser.parse_args(argv).command
    if not command:
        parser.error("a command is needed, e.g.: python -m scripts.peak_memory make real")
    try:
        code, peak = run(command)
    except OSError as error:
        parser.error(f"{command[0]} can't be started: {error.strerror}")
    print(f"peak memory of all processes: {peak / 2**30:.2f} GiB", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
