"""Write the embedded data set, images of coloured shapes and questions about them, into a folder, once."""

from __future__ import annotations

from collections.abc import Sequence

from data import shapes
from data.commands._shared import at_least, make_parser, run_guarded

EXAMPLES = """\
  python -m data.shapes --out runs/shapes
  python -m data.shapes --out runs/shapes --train 1000 --eval 100 --seed 7
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("python -m data.shapes", __doc__ or "", EXAMPLES)
    parser.add_argument("--out", required=True, help="folder to write: train.json, eval.json, images/")
    parser.add_argument("--train", type=at_least(0), default=4000, help="training images (default: %(default)s)")
    parser.add_argument("--eval", type=at_least(0), default=400, help="held-out images (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="which images (default: %(default)s)")
    options = parser.parse_args(arguments)

    def action() -> int:
        written = shapes.write(options.out, options.train, options.eval, options.seed)
        print(
            f"{options.out}: {options.train} training and {options.eval} held-out pictures"
            + ("" if written else ", there already")
        )
        return 0

    return run_guarded("data.shapes", action)
