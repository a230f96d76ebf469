"""Runs vLLM's server as ``python -m <module> <arguments>`` would, so that bad images are refused with a 4xx. vLLM 0.32 drops the
connection on two kinds, since it does not expect the errors they raise.

Pillow raises an error of its own for an image beyond 179 million pixels, before vLLM compares the size with its limit. Here vLLM's limit is
set, and Pillow's is lifted. A file is a ``RuntimeError`` where no folder is allowed, and a ``ValueError`` where it lies outside of the
folder that is: here an empty one is.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile

from PIL import Image

LIMIT = "VLLM_MAX_IMAGE_PIXELS"
FOLDER = "--allowed-local-media-path"


def main() -> None:
    from visionzip.images import MAX_PIXELS

    if int(os.environ.setdefault(LIMIT, str(MAX_PIXELS))) > 0:
        Image.MAX_IMAGE_PIXELS = None
    del sys.argv[0]
    with tempfile.TemporaryDirectory(prefix="visionzip-no-images-") as empty:
        if not any(argument.startswith(FOLDER) for argument in sys.argv):
            sys.argv += [FOLDER, empty]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
