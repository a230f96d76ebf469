"""VisionZip for Hugging Face models: run and fine-tune vision-language models on a tenth of their visual tokens."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from visionzip.version import __version__

if TYPE_CHECKING:
    from visionzip.attach import Attachment, attach, attached, detach, visionzip
    from visionzip.config import ZipConfig
    from visionzip.loading import load, save
    from visionzip.switch import set_budget

__all__ = [
    "Attachment",
    "ZipConfig",
    "__version__",
    "attach",
    "attached",
    "detach",
    "load",
    "save",
    "set_budget",
    "visionzip",
]

_FILES = {"attach": ("Attachment", "attach", "attached", "detach", "visionzip"), "config": ("ZipConfig",), "loading": ("load", "save"), "switch": ("set_budget",)}  # fmt: skip
_HOME = {name: file for file, names in _FILES.items() for name in names}


class _Package(ModuleType):
    """Imports each name on first use: torch and transformers take seconds, and ``visionzip --help`` needs neither."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{self.__name__}.{_HOME[name]}"), name)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        # An imported file becomes an attribute of its package; the module attach.py must not shadow the function `attach`.
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
