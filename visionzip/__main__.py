"""``python -m visionzip`` is ``visionzip``."""

import sys

from visionzip.cli import main

if __name__ == "__main__":
    sys.exit(main())
