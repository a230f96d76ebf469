"""find the threshold of per-image budgets that gives a mean number of tokens

  visionzip calibrate data/tiny-llava runs/demo/data/images --mean 16 --dominant 27 --contextual 3
  visionzip calibrate llava-hf/llava-1.5-7b-hf photos/ --mean 64 --dominant 128 --contextual 10 --measure coverage

Prints the `zip:` section of a config. --dominant is the maximum an image keeps (CLS included); all images have the same number of
contextual tokens. The mean is over the images given here, so use images like those that the model will see.
"""

from __future__ import annotations

import argparse
import sys

from visionzip.argument_types import at_least
from visionzip.commands import _model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    parser.add_argument("path", help="an image or a folder of images")
    parser.add_argument("--mean", type=float, required=True, help="tokens per image (or tile) on average")
    parser.add_argument("--measure", choices=("attention", "coverage"), default="attention", help="measure of the threshold (default: attention)")  # fmt: skip
    parser.add_argument("--least", type=at_least(1), default=1, help="dominant tokens every image keeps (default: 1)")
    parser.add_argument("--limit", type=at_least(1), help="at most this many images of a folder")


def run(arguments: argparse.Namespace) -> None:
    import torch
    import yaml

    from visionzip.analysis import image_files
    from visionzip.analysis.calibrate import calibrated
    from visionzip.attach import attached
    from visionzip.config import Adaptive

    adaptive = Adaptive(threshold=0.5, measure=arguments.measure, least=arguments.least)
    found = image_files.find_images(arguments.path, arguments.limit)
    model, processor = _model.load(arguments)
    attachment = attached(model)
    assert attachment is not None
    result = calibrated(attachment, processor, (each for _, each in found.images()), arguments.mean, adaptive)
    counts = result.counts.double()
    spread = ", ".join(f"{torch.quantile(counts, q).item():.0f}" for q in (0.0, 0.1, 0.5, 0.9, 1.0))
    print(yaml.safe_dump({"zip": result.config.model_dump(exclude_none=True)}, sort_keys=False), end="")
    print(
        f"# {len(counts)} images or tiles: {result.mean:.2f} tokens on average; least, 10 %, median, 90 %, most: {spread}"
    )
    if found.skipped:
        print(found.summary(), file=sys.stderr)
