"""Write the data set of photographed stamps into a folder, once.

    python -m data.commands.stamps --out runs/stamps
    python -m data.commands.stamps --out runs/stamps --train 1000 --stamps FOLDER --backgrounds FOLDER

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

from data.stamp_files import check_stamps, fetch, find_photographs
from data.stamps import SIDE, Size, write

CACHE = "~/.cache/visionzip-ft/stamps"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    size = Size(options.train, options.eval, options.unseen, options.side, options.conversations)
    total = size.train + size.eval + size.unseen
    try:
        if options.stamps is None or options.backgrounds is None:
            stamps, backgrounds = fetch(Path(options.cache).expanduser())
        if options.stamps is not None:
            stamps = Path(options.stamps)
        if options.backgrounds is not None:
            backgrounds = find_photographs(Path(options.backgrounds))
        check_stamps(stamps)
        columns = (TextColumn("composing scenes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=total, visible=False)
            written = write(
                options.out,
                stamps,
                backgrounds,
                size,
                options.seed,
                options.workers,
                progress=lambda done: progress.update(task, completed=done, visible=True),
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.out}: {size.train} training, {size.eval} held-out scenes, and {size.unseen} of things never seen in training"
        + ("" if written else ", there already")
    )
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m data.commands.stamps", description=str(__doc__).partition("\n\n")[0])
    default = Size()
    parser.add_argument("--out", required=True, help="folder to write: train.json, eval.json, unseen.json, images/")
    for split in ("train", "eval", "unseen"):
        value = getattr(default, split)
        parser.add_argument(
            f"--{split}", type=at_least(0), default=value, help=f"scenes of the split {split} (default: %(default)s)"
        )
    parser.add_argument(
        "--conversations", type=at_least(1), default=default.conversations,
        help="about each training scene (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--side", type=at_least(32), default=SIDE, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="which scenes (default: %(default)s)")
    parser.add_argument("--stamps", help="folder of Tux Paint's stamps (default: fetched)")
    parser.add_argument("--backgrounds", help="folder of photographs without things in them (default: fetched)")
    parser.add_argument("--cache", default=CACHE, help="where fetched files are kept (default: %(default)s)")
    parser.add_argument(
        "--workers", type=at_least(1), default=min(os.cpu_count() or 1, 8), help="processes (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def at_least(least: int):
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; expected at least {least}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
