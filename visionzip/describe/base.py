"""A description, the list of kinds, and how one looks in a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionzip.registry import Registry


@dataclass
class Description:
    """What something is.

    Attributes:
        what: one phrase, "a projector fine-tuned with visionzip-ft".
        facts: label → value, in the order they are shown.
        problems: what is wrong with it.
        use: commands or code that do something with it.
    """

    what: str
    path: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    use: list[str] = field(default_factory=list)


Kind = Callable[[Path], "Description | None"]
KINDS: Registry[tuple[int, Kind]] = Registry("kind", "visionzip.describe")


def kind(name: str, rank: int) -> Callable[[Kind], Kind]:
    """Register a function that describes a path of its kind and returns None for any other. Low ranks are asked first."""

    def register(function: Kind) -> Kind:
        KINDS.register(name)((rank, function))
        return function

    return register


def describe(path: str | os.PathLike[str]) -> Description:
    """What lies at `path`, or what a hub id names.

    Raises:
        ValueError: when there is nothing; whatever is there but can't be read is described as such.
    """
    from visionzip.describe.models import hub_model

    place = Path(path)
    if not place.exists():
        return hub_model(str(path))
    for _, function in sorted((entry for _, entry in KINDS), key=lambda entry: entry[0]):
        found = function(place)
        if found is not None:
            found.path = str(path)
            return found
    return unknown(place)


def unknown(place: Path) -> Description:
    facts: dict[str, Any] = {}
    if place.is_dir():
        names = sorted(path.name + "/" * path.is_dir() for path in place.iterdir())
        facts["Holds"] = ", ".join(names[:12]) + (f" … ({len(names)} in all)" if len(names) > 12 else "") or "nothing"
    else:
        facts["Size"] = size(place.stat().st_size)
        with open(place, "rb") as file:
            facts["Begins with"] = repr(file.read(24))
    return Description(
        f"a {'directory' if place.is_dir() else 'file'} of a kind this toolkit does not know", str(place), facts
    )


def size(count: float) -> str:
    """Bytes in words: ``13.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def number(count: float) -> str:
    """A count in words: ``21.0 M``."""
    for unit, step in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if count >= step:
            return f"{count / (1e3 if unit == 'k' else step):.3g} {unit}"
    return f"{count:,.0f}"


def show(found: Description, file: Any = None) -> None:
    """Print it, wrapped to the terminal."""
    out = file or sys.stdout
    bold, plain = ("\033[1m", "\033[0m") if out.isatty() else ("", "")
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    print(f"{bold}{found.path}{plain}\n  is {found.what}.\n", file=out)
    column = max((len(label) for label in found.facts), default=0) + 2
    for label, value in found.facts.items():
        lines = textwrap.wrap(str(value), width - column - 2, break_on_hyphens=False, break_long_words=False) or [""]
        print(f"  {label:<{column}}{lines[0]}", file=out)
        for line in lines[1:]:
            print(f"  {'':<{column}}{line}", file=out)
    for problem in found.problems:
        lines = textwrap.wrap(problem, width - 11, break_on_hyphens=False, break_long_words=False)
        print(f"\n  {bold}Problem{plain}: " + "\n           ".join(lines), file=out)
    if found.use:
        print("\n  To use it:", file=out)
        for line in found.use:
            print(f"    {line}", file=out)
