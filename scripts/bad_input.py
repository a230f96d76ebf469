"""How a script ends when it is given something that it can't use: one sentence and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_code_of(main: Callable[[], int | None]) -> int:
    """Run `main`; a ValueError or OSError, which is what missing paths and wrong settings raise, is printed without a traceback."""
    try:
        return main() or 0
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
