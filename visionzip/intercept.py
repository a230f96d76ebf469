"""Everything that the library changes on objects of other libraries goes through here, one way for each kind, and can be undone.

``docs/architecture.md`` ("Interceptions") lists who uses which. Only instances are changed, never classes: two models in one
process can differ, and one that was detached is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")


@dataclass
class Interceptions:
    """What was put on instances. Copies and pickles with them; as a context manager it is undone at the end.

    Attributes:
        changes: ``(object, attribute)`` of what was replaced.
        handles: of the hooks.
    """

    changes: list[tuple[Any, str]] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Let `value` stand in for an attribute of the class of `owner`, on this instance."""
        owner.__dict__[name] = value  # not setattr: a module would register a submodule
        self.changes.append((owner, name))

    def swap(self, owner: Any, name: str, value: Any) -> None:
        """Another value for what `replace` put there; on an instance that is not ours (a copy's processor) nothing happens."""
        if self.holds(owner, name):
            owner.__dict__[name] = value

    def before_forward(self, module: nn.Module, hook: Callable[..., Any], *, prepend: bool = False) -> None:
        """`hook(module, args, kwargs)` sees what `module` is called with, and may give other ``(args, kwargs)``."""
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend))

    def after_forward(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """`hook(module, args, output)` sees what `module` gives."""
        self.handles.append(module.register_forward_hook(hook))

    def holds(self, owner: Any, name: str) -> bool:
        """Whether this attribute was replaced by us."""
        return any(other is owner and replaced == name for other, replaced in self.changes)

    def undo(self) -> None:
        """Take off exactly what was put on."""
        for owner, name in self.changes:
            owner.__dict__.pop(name, None)
        for handle in self.handles:
            handle.remove()
        self.changes, self.handles = [], []

    def __enter__(self) -> Interceptions:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


class Scoped(Generic[T]):
    """A value that is there inside of a ``with`` block, in this thread (and in what it awaits)."""

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        token = self._variable.set(value)
        try:
            yield
        finally:
            self._variable.reset(token)

    def get(self) -> T | None:
        return self._variable.get()
