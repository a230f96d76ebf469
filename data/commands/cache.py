"""Compute the compressed visual tokens of every image of a config once; every epoch, run and rank then reads them.

Interrupted or damaged, the same command goes on or repairs. Several processes share the work; several nodes write into one shared
folder, or each into its own, whose shards are then copied together.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.commands._shared import add_config, at_least, make_parser, run_guarded

EXAMPLES = """\
  python -m data.cache --config configs/llava-1.5-7b/ft-64.yaml data.cache=/data/tokens-64
  torchrun --nproc_per_node 8 -m data.cache --config ... data.cache=...        one process for each GPU
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("python -m data.cache", __doc__ or "", EXAMPLES)
    add_config(parser)
    parser.add_argument(
        "--batch", type=at_least(1), default=64, help="images through the encoder at once (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=at_least(0), default=4, help="processes that read images (default: %(default)s)"
    )
    options = parser.parse_intermixed_args(arguments)

    def action() -> int:
        from data.cache.build import build_cache
        from data.config import load_config

        build_cache(load_config(options.config, options.overrides), options.batch, options.workers)
        return 0

    return run_guarded("data.cache", action)
