"""One file a record layout. A module here has

- `matches(record, columns) -> bool`: whether `auto` should take this layout for the record, by its columns;
- `read(record, source) -> Draft`: the record's turns and media, or `Reject`;
- `PRIORITY`: `auto` asks layouts with the most telling columns (lowest number) first.

What all layouts have in common (whose turn it is, where images stand, which paths are allowed) is in `common.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from data.formats.common import RecordSource, build_sample
from data.sample import Reject, Sample


def list_formats() -> list[str]:
    """Every layout there is, found by file so that a new one needs no registration elsewhere."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "common")


@cache
def _layouts() -> dict[str, ModuleType]:
    modules = {name: importlib.import_module(f"data.formats.{name}") for name in list_formats()}
    return dict(sorted(modules.items(), key=lambda item: item[1].PRIORITY))


def parse_record(record: Any, source: RecordSource, position: int) -> Sample:
    """A `Sample` of one record, the `position`-th of its source. Raises `Reject` where that can't be."""
    if not isinstance(record, Mapping):
        raise Reject("wrong type", f"a record must be an object, found {type(record).__name__}")
    for name, layout in _layouts().items():
        if source.format == name or (source.format == "auto" and layout.matches(record, source.columns)):
            return build_sample(layout.read(record, source), source, position)
    raise Reject("unknown layout", f"columns {sorted(map(str, record))}; map them with `columns` or name a `format`")
