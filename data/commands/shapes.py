"""write the embedded data set, images of coloured shapes and questions about them, into a folder, once

python -m data.shapes --out runs/shapes
python -m data.shapes --out runs/shapes --train 1000 --eval 100 --seed 7
python -m data.shapes --out runs/shapes --locate
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data import shapes
from data.commands._shared import run_guarded, start
from visionzip.argument_types import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder to write: train.json, eval.json, images/")
    parser.add_argument("--train", type=at_least(0), default=4000, help="training images (default: %(default)s)")
    parser.add_argument("--eval", type=at_least(0), default=400, help="held-out images (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the images (default: %(default)s)")

    parser.add_argument(
        "--locate",
        action="store_true",
        help="write locate-train.json and locate-eval.json as well: questions about places in the same images",
    )


def run(arguments: argparse.Namespace) -> int:
    return run_guarded("data.shapes", lambda: write(arguments))


def write(arguments: argparse.Namespace) -> int:
    written = shapes.write(arguments.out, arguments.train, arguments.eval, arguments.seed, arguments.locate)
    print(
        f"{arguments.out}: {arguments.train} training and {arguments.eval} held-out images"
        + ("" if written else ", there already")
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return start(sys.modules[__name__], "python -m data.shapes", arguments)
