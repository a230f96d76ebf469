"""What the commands that write a plot and figures share: ``--plot``, ``--json`` and ``--theme`` are checked before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse files that could not be written in the end.

    Raises:
        ImportError: a plot is wanted and what draws it is not installed.
        ValueError: ``--plot`` is no PNG, or a file is a directory.
    """
    from visionzip.analysis import style

    if arguments.plot:
        with style.style(arguments.theme):
            pass  # says what is missing before minutes of measuring
        if Path(arguments.plot).suffix.lower() != ".png":
            raise ValueError(f"--plot {arguments.plot}: expected the name of a PNG file")
    for file in filter(None, (arguments.json, arguments.plot)):
        if Path(file).is_dir():
            raise ValueError(f"{file} is a directory; expected the name of a file")
