"""One file a conversation template; the file's name is the template's. See `data/template.py` for what a file must hold."""

from __future__ import annotations

import pkgutil


def names() -> list[str]:
    """Every template there is, found by file so that a new one needs no registration elsewhere."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
