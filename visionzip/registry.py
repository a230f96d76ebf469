"""A name → implementation table whose entries are the files of one package."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations by name. A file in `package` registers itself; nothing else has to change.

    Raises:
        ValueError: on an unknown name (the known ones are listed) and on a name taken twice.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what = what
        self._package = package
        self._entries: dict[str, T] = {}
        self._complete = False

    def register(self, *names: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"the {self.what} {name!r} is registered twice")
                self._entries[name] = entry
            return entry

        return add

    def _discover(self) -> None:
        if not self._complete:
            for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._complete = True  # only now: a file that fails to import must fail every time it is asked for

    def __getitem__(self, name: str) -> T:
        self._discover()
        if name not in self._entries:
            raise ValueError(f"no {self.what} is called {name!r}; known: {', '.join(sorted(self._entries))}")
        return self._entries[name]

    def get(self, name: str) -> T | None:
        self._discover()
        return self._entries.get(name)

    def names(self) -> list[str]:
        self._discover()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._discover()
        return iter(sorted(self._entries.items()))
