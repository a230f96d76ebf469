"""The commands of the program, one file each: a docstring whose first line is the summary, `add_arguments`, `run`.

`run(arguments)` returns an exit code (`train.ending.Exit`); errors have been printed by then.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence


def start(name: str, arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse `arguments` (default: the process's own) for the command `name` and run it; returns the exit code."""
    command = importlib.import_module(f"train.commands.{name}")
    parser = argparse.ArgumentParser(
        program or f"python -m train.{name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return int(command.run(parser.parse_intermixed_args(arguments)))
