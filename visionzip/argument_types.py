"""Types of command-line options, for the library's commands and the program's."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an option that is an integer of at least `least`; argparse reports anything else."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, found {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, found {value}")
        return value

    return parse
