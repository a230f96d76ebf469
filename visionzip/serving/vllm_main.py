"""Runs vLLM's server as ``python -m <module> <arguments>`` would, with one limit for the size of images.

Pillow raises an error of its own for an image beyond 179 million pixels, before vLLM compares the size with its limit; vLLM 0.32 does not
expect it, and drops the connection. Here vLLM's limit is set, and Pillow's is lifted, so that such an image is refused like any other.
"""

from __future__ import annotations

import os
import runpy
import sys

from PIL import Image

LIMIT = "VLLM_MAX_IMAGE_PIXELS"


def main() -> None:
    from visionzip.images import MAX_PIXELS

    if int(os.environ.setdefault(LIMIT, str(MAX_PIXELS))) > 0:
        Image.MAX_IMAGE_PIXELS = None
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
