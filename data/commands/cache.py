"""compute the visual tokens of a config's images once, for all epochs, runs and ranks to read

  visionzip cache --config configs/llava-1.5-7b/ft-64.yaml data.cache=/data/tokens-64
  torchrun --nproc_per_node 8 -m data.cache --config ... data.cache=...        one process for each GPU

The same command continues an interrupted cache and repairs a damaged one. Several processes share the work; several nodes write into one
shared folder, or each into a separate one, whose shards are then copied together.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from data.commands._shared import add_config, run_guarded, start
from visionzip.argument_types import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--batch", type=at_least(1), default=64, help="images encoded at once (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=min(os.cpu_count() or 1, 4),
        help="processes that read images (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    return run_guarded("data.cache", lambda: cache(arguments))


def cache(arguments: argparse.Namespace) -> int:
    from data.cache.build import build_cache
    from data.config import load_config

    build_cache(load_config(arguments.config, arguments.overrides), arguments.batch, arguments.workers)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return start(sys.modules[__name__], "python -m data.cache", arguments)
