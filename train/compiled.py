"""`trainer.torch_compile`: the norms and MLPs of the LLM's layers through torch.compile, once for every length.

The Trainer would compile the whole model. A packed row tells attention where its samples begin, so each batch would be compiled
anew. The gain lies outside of attention: intermediate results that are written to memory and read again.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def compiled_parts(llm: Any) -> list[nn.Module]:
    """All modules of a decoder's layers except their attention."""
    return [part for layer in llm.layers for name, part in layer.named_children() if "attn" not in name]


def compile_parts(llm: Any, backend: str = "inductor", mode: str | None = None) -> None:
    """In place; state dict and hooks stay as they are. Layers of one kind share what is compiled, of any number of tokens."""
    for part in compiled_parts(llm):
        part.compile(dynamic=True, backend=backend, mode=mode)


def uncompile_parts(llm: Any) -> None:
    for part in compiled_parts(llm):
        part._compiled_call_impl = None


def check_backend(name: str) -> None:
    """Raises ValueError for a backend that torch does not have."""
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise ValueError(f"torch_compile_backend: {name!r} is none of {', '.join(known)}")
