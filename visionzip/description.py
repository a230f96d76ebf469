"""What `visionzip inspect` says about something, and how it looks in a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: key of a run's results → what that model is called
MEASURED = {"full": "all tokens", "training_free": "compressed", "fine_tuned": "fine-tuned"}


@dataclass
class Description:
    """What something is.

    Attributes:
        what: one phrase, "a projector fine-tuned with visionzip-ft".
        facts: label → value, in the order they are shown.
        problems: what is wrong with it, one sentence each.
        use: commands or code that do something with it.
    """

    what: str
    path: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    use: list[str] = field(default_factory=list)


def print_description(found: Description, file: Any = None) -> None:
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


def format_size(count: float) -> str:
    """Bytes in words: ``13.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_count(count: float) -> str:
    """A count in words: ``21.0 M``."""
    for unit, step in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if count >= step:
            return f"{count / (1e3 if unit == 'k' else step):.3g} {unit}"
    return f"{count:,.0f}"


def format_results(results: Mapping[str, Any]) -> str:
    """``all tokens 98.7 %, compressed 83.9 %, fine-tuned 93.4 %``; what was not measured is left out."""
    known = {label: results.get(name) for name, label in MEASURED.items()}
    return ", ".join(f"{label} {100 * value:.1f} %" for label, value in known.items() if isinstance(value, float))


def bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
