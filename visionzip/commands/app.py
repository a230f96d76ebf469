"""serve a page to look at a model: move the budget, click patches, ask

  visionzip app data/tiny-llava
  visionzip app llava-hf/llava-1.5-7b-hf --image photo.jpg --port 7861

Only this machine can reach it, unless --host says otherwise.
"""

from __future__ import annotations

import argparse

from visionzip.commands import _model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    parser.add_argument("--image", "--picture", help="shown from the start")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--open", action="store_true", help="open it in a browser")


def run(arguments: argparse.Namespace) -> None:
    from visionzip.analysis import pictures
    from visionzip.app.looker import Looker
    from visionzip.app.ui import build, gradio, refuse_taken, serve

    gradio()
    refuse_taken(arguments.host, arguments.port)  # both before a model is loaded for nothing
    if arguments.image:
        pictures.read_one(arguments.image)
    model, processor = _model.load(arguments)
    page = build(Looker(model, processor), arguments.model, arguments.image)
    serve(page, arguments.host, arguments.port, open_browser=arguments.open)
