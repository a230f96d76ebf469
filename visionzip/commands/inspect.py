"""say in plain words what a model, projector, checkpoint, cache or run is

  visionzip inspect runs/demo/projector
  visionzip inspect somebody/tiny-llava-visionzip-16 --json

No weights are loaded into a model, and no code that comes with one is run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a file, a directory, or an id on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> None:
    from visionzip.hub import local_copy
    from visionzip.inspect import describe, print_description

    place = arguments.path
    found = describe(place if Path(place).exists() else local_copy(place))
    if arguments.json:
        print(json.dumps(asdict(found), indent=2, default=str))
    else:
        print_description(found)
