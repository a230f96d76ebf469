"""draw which patches of images, tiles and video frames are kept, as PNGs and one HTML page

  visionzip visualize data/tiny-llava photos/ --out runs/look.html
  visionzip visualize llava-hf/llava-1.5-7b-hf photo.jpg --dominant 54 --contextual 10
  visionzip visualize runs/ft-64/projector clip.mp4 --frames 8

For each image: what the encoder saw, where its attention is, the kept patches with the rest whitened, and which patches were
merged into which token.
"""

from __future__ import annotations

import argparse
import sys

from visionzip.argument_types import at_least
from visionzip.commands import _model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    parser.add_argument("path", help="an image, a folder of images, or a video")
    parser.add_argument(
        "--out",
        default="visionzip-report.html",
        help="HTML page to write; the PNGs go into a folder of the same name beside it",
    )
    parser.add_argument(
        "--theme",
        choices=("light", "dark"),
        default="light",
        help="theme of the PNGs (the page follows the reader's setting)",
    )
    parser.add_argument(
        "--frames", type=at_least(1), default=8, help="frames sampled uniformly from a video (default: 8)"
    )
    parser.add_argument("--limit", type=at_least(1), help="at most this many images of a folder")


def run(arguments: argparse.Namespace) -> None:
    from visionzip.analysis import image_files
    from visionzip.analysis.visualize import output_paths, visualize
    from visionzip.video import decode_video

    if image_files.is_video(arguments.path):  # all of this can fail before a model is loaded
        decode_video(arguments.path, arguments.frames)
    else:
        image_files.find_images(arguments.path, results=output_paths(arguments.out)[1])
    model, _ = _model.load(arguments)
    result = visualize(
        model, arguments.path, arguments.out, theme=arguments.theme, frames=arguments.frames, limit=arguments.limit,
        title=arguments.model, progress=sys.stderr.isatty(),
    )  # fmt: skip
    for name, _, tokens, of_tokens, held in result.rows:
        print(f"{name}: {tokens} of {of_tokens} tokens, holding {held} of the attention")
    for name, reason in result.skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    print(f"{result.page}  ({len(result.images)} PNGs in {output_paths(arguments.out)[1]})")
