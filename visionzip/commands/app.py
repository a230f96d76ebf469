"""serve a page to look at a model: move the budget, click patches, ask

  visionzip app data/tiny-llava
  visionzip app llava-hf/llava-1.5-7b-hf --image photo.jpg --port 7861
  visionzip app runs/demo/projector --public-url https://look.example.org     behind a reverse proxy

Only this machine can reach the app, unless --host says otherwise. Requests for other host names or from other web sites are
refused.
"""

from __future__ import annotations

import argparse
from urllib.parse import urlsplit

from visionzip.commands import _model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    parser.add_argument("--image", "--picture", help="image shown at the start")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--public-url",
        type=public_url,
        action="append",
        default=[],
        metavar="URL",
        help="address that a reverse proxy serves the app at; can be given several times",
    )
    parser.add_argument("--open", action="store_true", help="open it in a browser")


def public_url(text: str) -> str:
    """``https://look.example.org``, without a slash at its end."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise argparse.ArgumentTypeError(f"expected an address such as https://look.example.org, got {text!r}")
    return text.rstrip("/")


def run(arguments: argparse.Namespace) -> None:
    from visionzip.app.looker import Looker
    from visionzip.app.server import check_port, exit_on_signals, gradio, serve
    from visionzip.app.ui import build
    from visionzip.images import decode_image

    exit_on_signals()
    gradio()
    check_port(arguments.host, arguments.port)  # both can fail before a model is loaded
    if arguments.image:
        decode_image(arguments.image)
    model, processor = _model.load(arguments)
    page = build(Looker(model, processor), arguments.model, arguments.image)
    server = serve(page, arguments.host, arguments.port, arguments.public_url)
    if arguments.open:
        import webbrowser

        webbrowser.open(server.address)
    print(f"{server.address}  (Ctrl+C ends it)", flush=True)
    try:
        server.wait()
    finally:
        server.close()
