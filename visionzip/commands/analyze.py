"""measure how concentrated an encoder's attention is, over many images

  visionzip analyze data/tiny-llava photos/ --out runs/attention

Concentration per layer, attention covered by a budget (and the budgets that cover 80, 90 and 95 %), agreement between layers: a
table, plots and JSON. Measurements are saved, so the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import sys

from visionzip.argument_types import at_least
from visionzip.commands import _model
from visionzip.words import count_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    parser.add_argument("path", help="a folder of images")
    parser.add_argument("--out", default="visionzip-analysis", help="folder for table, plots and JSON")
    parser.add_argument("--theme", choices=("light", "dark"), default="light", help="theme of the plots")
    parser.add_argument("--limit", type=at_least(1), help="at most this many images, in the order of their names")


def run(arguments: argparse.Namespace) -> None:
    from visionzip.analysis import image_files
    from visionzip.analysis.analyze import analyze, render_summary, summarize, write

    image_files.find_images(arguments.path, results=arguments.out)  # fails before a model is loaded
    model, _ = _model.load(arguments)
    found = analyze(model, arguments.path, arguments.out, limit=arguments.limit)
    files = write(found, arguments.theme, arguments.model)  # before anything is printed: whoever reads may have gone
    if found.resumed:
        print(f"measured before: {count_of(found.resumed, 'image')}")
    print(render_summary(summarize(found)))
    for name, reason in found.skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    print(f"\n{arguments.out}: {', '.join(path.name for path in files)}")
