"""Run a page's Python blocks in order, as a notebook is run, and compare what they print with the `text` block behind each.

    python -m scripts.run_docs docs/api.md            says what differs
    python -m scripts.run_docs docs/api.md --write    puts in what was printed

Blocks share their names. They run in a directory of their own that sees the checkout's `data/`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<text>.*?)```\n)?", re.DOTALL)


def run(page: str) -> tuple[str, list[str]]:
    """The page with what its blocks print now, and what differs from before.

    Raises:
        Whatever a block raises.
    """
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # DeepSpeed, where others import it, would print that it found no GPU
    names: dict = {"__name__": "__main__"}
    differences: list[str] = []

    def block(found: re.Match) -> str:
        printed = io.StringIO()
        line = page[: found.start()].count("\n") + 2
        code = compile("\n" * (line - 1) + found["code"], "page", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        before, now = found["text"] or "", printed.getvalue()
        if before != now:
            differences.append(f"block at line {line}: expected {before!r}, printed {now!r}")
        return f"```python\n{found['code']}```\n" + (f"\n```text\n{now}```\n" if now else "")

    with tempfile.TemporaryDirectory() as folder, working_in(folder):
        os.symlink(ROOT / "data", Path(folder) / "data")
        made = BLOCK.sub(block, page)
    return made, differences


@contextlib.contextmanager
def working_in(folder: str) -> Iterator[None]:
    """`contextlib.chdir`, which Python 3.10 does not have."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    page = arguments.page.read_text(encoding="utf-8")
    made, differences = run(page)
    if arguments.write:
        arguments.page.write_text(made, encoding="utf-8")
    print("\n".join(differences) or "all blocks print what the page says")
    return int(bool(differences) and not arguments.write)


if __name__ == "__main__":
    sys.exit(main())
