"""`trainer.torch_compile`: the LLM's layers through torch.compile, once for every length.

The Trainer would compile the whole model. A packed row tells attention where its samples begin, so each batch would be compiled
anew; there the norms and MLPs are compiled, whose intermediate results are otherwise written to memory and read again. Under
`model.attn_implementation: eager` attention is a few matrix products like all the rest, and layers are compiled whole. On CPUs that is
the fastest: the backward pass of SDPA's CPU kernel takes a third of a small LLM's step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def takes_whole_layers(llm: Any) -> bool:
    """Whether attention can be compiled along: no kernel of its own, nothing that a row says about its samples."""
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in llm.modules())
    return llm.config._attn_implementation == "eager" and not recomputes


def compiled_parts(llm: Any) -> list[nn.Module]:
    """A decoder's layers where `takes_whole_layers`, else all modules of its layers except their attention."""
    if takes_whole_layers(llm):
        return list(llm.layers)
    return [part for layer in llm.layers for name, part in layer.named_children() if "attn" not in name]


def compile_parts(llm: Any, backend: str = "inductor", mode: str | None = None) -> None:
    """In place; state dict and hooks stay as they are. Layers of one kind share what is compiled, of any number of tokens."""
    for part in compiled_parts(llm):
        part.compile(dynamic=True, backend=backend, mode=mode)
        compiled: Any = part._compiled_call_impl
        part._compiled_call_impl = partial(call_compiled, part, compiled)


def call_compiled(part: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`compiled`, except with a KV cache: that differs from layer to layer and step to step, and each would be compiled anew until
    torch gives up on the layer for good, in training too."""
    return (compiled if kwargs.get("past_key_values") is None else part._call_impl)(*args, **kwargs)


def uncompile_parts(llm: Any) -> None:
    for module in llm.modules():
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None


def describe_compiled(llm: Any) -> str:
    return "layers compiled" if takes_whole_layers(llm) else "norms and MLPs compiled"


def check_backend(name: str) -> None:
    """Raises ValueError for a backend that torch does not have."""
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise ValueError(f"torch_compile_backend: {name!r} is none of {', '.join(known)}")
