"""Write the data set of photographed stamps into a folder, once.

    python -m data.commands.stamps --out runs/stamps
    python -m data.commands.stamps --out runs/stamps --train 1000 --stamps FOLDER --backgrounds FOLDER
    python -m data.commands.stamps --out runs/stamps --locate

Without ``--stamps`` and ``--backgrounds`` the files come from two Debian packages, fetched into ``--cache`` on first use.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data import stamps
from data.commands._shared import run_guarded, start
from data.stamp_files import check_stamps, fetch, find_photographs
from visionzip.argument_types import at_least

PROGRAM = "data.commands.stamps"
CACHE = "~/.cache/visionzip-ft/stamps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder to write: train.json, eval.json, unseen.json, images/")
    default = stamps.Size()
    for split in stamps.SPLITS:
        parser.add_argument(
            f"--{split}",
            type=at_least(0),
            default=getattr(default, split),
            help=f"scenes of the split {split} (default: %(default)s)",
        )
    parser.add_argument(
        "--locate",
        action="store_true",
        help="write locate-train.json and locate-eval.json as well: questions about places in the same images",
    )
    parser.add_argument("--side", type=at_least(32), default=stamps.SIDE, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the scenes (default: %(default)s)")
    parser.add_argument("--stamps", help="folder of Tux Paint's stamps (default: fetched)")
    parser.add_argument("--backgrounds", help="folder of photographs used as backgrounds (default: fetched)")
    parser.add_argument("--cache", default=CACHE, help="where fetched files are kept (default: %(default)s)")
    parser.add_argument(
        "--workers", type=at_least(1), default=min(os.cpu_count() or 1, 8), help="processes (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    return run_guarded(PROGRAM, lambda: write(arguments))


def write(arguments: argparse.Namespace) -> int:
    size = stamps.Size(arguments.train, arguments.eval, arguments.unseen, arguments.side)
    folder, backgrounds = find_files(arguments)
    check_stamps(folder)
    columns = (TextColumn("composing scenes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=size.train + size.eval + size.unseen, visible=False)
        written = stamps.write(
            arguments.out,
            folder,
            backgrounds,
            size,
            arguments.seed,
            arguments.workers,
            progress=lambda done: progress.update(task, completed=done, visible=True),
            located=arguments.locate,
        )
    print(
        f"{arguments.out}: {size.train} training, {size.eval} held-out scenes, "
        f"and {size.unseen} of things never seen in training" + ("" if written else ", there already")
    )
    return 0


def find_files(arguments: argparse.Namespace) -> tuple[Path, list[Path]]:
    """The folder of stamps and the backgrounds: those given by hand, the others fetched."""
    if arguments.stamps and arguments.backgrounds:
        return Path(arguments.stamps), find_photographs(Path(arguments.backgrounds))
    folder, backgrounds = fetch(Path(arguments.cache).expanduser())
    if arguments.backgrounds:
        backgrounds = find_photographs(Path(arguments.backgrounds))
    return Path(arguments.stamps or folder), backgrounds


def main(arguments: Sequence[str] | None = None) -> int:
    return start(sys.modules[__name__], f"python -m {PROGRAM}", arguments)


if __name__ == "__main__":
    sys.exit(main())
