"""A micro-batch as one row without padding. Only attention has to know where a sample begins.

Linear layers, norms and MLPs treat each token by itself, so that padding only costs time there. Attention is computed sample by
sample (by one variable-length flash kernel on a GPU that has it): no token sees another sample, and no mask is ever formed.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.labels import IGNORE
from train.prefix import recomputes_activations
from visionzip.attach import unwrap
from visionzip.families import family_for

logger = logging.getLogger(__name__)

NAME = "visionzip_packed"


@dataclass
class Packed:
    """Where the samples of a row begin. `prefix`: keys and values ``(1, H, P, d)`` of each layer that all samples see first."""

    lengths: list[int]
    prefix: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _tables: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def before(self) -> int:
        return self.prefix[0][0].shape[2] if self.prefix else 0

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Starts of queries and of keys ``(B + 1,)`` int32, and for each key its place in [prefix, row]. Made once a batch."""
        if self._tables is None:
            queries = list(itertools.accumulate(self.lengths, initial=0))
            keys = [start + number * self.before for number, start in enumerate(queries)]
            shared = list(range(self.before))
            places = [shared + list(range(self.before + a, self.before + b)) for a, b in itertools.pairwise(queries)]
            flat = torch.tensor([place for each in places for place in each])
            made = torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32), flat
            self._tables = tuple(table.to(device) for table in made)  # type: ignore[assignment]
        return self._tables  # type: ignore[return-value]


def pack(
    inputs: dict[str, Any], labels: Tensor, prefix: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Right-padded ``(B, L)`` inputs and labels → the same samples in one row ``(1, T)``, with `packing` for the attention.

    Images stay in the order of the rows, as the model expects them.
    """
    real = inputs["attention_mask"].bool()
    packed = Packed(real.sum(dim=1).tolist(), prefix or [])
    first = torch.zeros_like(real)
    first[:, 0] = True  # nothing before a sample predicts its first token
    labels = labels.masked_fill(first, IGNORE)[real][None]
    places = torch.arange(packed.before, packed.before + real.shape[1], device=real.device).expand_as(real)
    row = {
        **inputs,
        "input_ids": inputs["input_ids"][real][None],
        "position_ids": places[real][None],
        # Four dimensions: handed through to the attention as it is, which ignores it.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=real.device),
        "packing": packed,
    }
    return row, labels


def pack_batch(inputs: dict[str, Any], labels: Tensor, prefix: Any = None) -> tuple[dict[str, Any], Tensor]:
    """`pack`, without the beginning that is in a `train.prefix.Prefix`, if all rows have it."""
    if prefix is None or not prefix.starts(inputs, labels):
        return pack(inputs, labels)
    length = len(prefix.beginning)
    shorter = {name: inputs[name][:, length:] for name in ("input_ids", "attention_mask")}
    return pack({**inputs, **shorter}, labels[:, length:], prefix.layers)


def can_pack(model: nn.Module, llm: nn.Module) -> bool:
    """Whether packing is exact: it replaces plain causal SDPA for positions 0, 1, 2 … (no M-RoPE, no bidirectional attention among
    the tokens of an image). Layers that recompute their activations would see another attention in the backward pass."""
    text: Any = llm.config
    windowed = any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or [])
    plain = family_for(unwrap(model)).plain_positions and text._attn_implementation == "sdpa"
    return plain and not windowed and not recomputes_activations(llm)


@contextmanager
def packed_attention(llm: Any) -> Iterator[None]:
    """Inside, the attention of `llm` treats the samples of a row separately."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before = llm.config._attn_implementation
    llm.config._attn_implementation = NAME
    try:
        yield
    finally:
        llm.config._attn_implementation = before


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    packing: Packed,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``(1, H, T, d)`` → ``(1, T, H, d)``. The signature is that of transformers' attention functions."""
    prefix = packing.prefix[module.layer_idx] if packing.prefix else None
    groups = query.shape[1] // key.shape[1]
    if variable_length(query.device, query.dtype, query.shape[-1], groups, scaling):
        return flash(query, key, value, scaling, packing, prefix), None
    return one_by_one(query, key, value, scaling, packing, prefix), None


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, packing: Packed, prefix: tuple[Tensor, Tensor] | None
) -> Tensor:
    out = []
    shared = query.shape[1] != key.shape[1]
    parts = (tensor.split(packing.lengths, dim=2) for tensor in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        mask = None
        if prefix is not None:
            k, v = torch.cat((prefix[0], k), dim=2), torch.cat((prefix[1], v), dim=2)
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(packing.before)
        out.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shared
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2)


def flash(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, packing: Packed, prefix: tuple[Tensor, Tensor] | None
) -> Tensor:
    """One kernel for all samples; with fewer queries than keys its causal mask ends at the lower right, as a prefix needs."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, places = packing.tables(query.device)
    query, key, value = (as_rows(tensor) for tensor in (query, key, value))
    if prefix is not None:
        # index_select, not key[places]: the latter's backward sorts the places, which repeat, and waits for the GPU.
        key, value = (
            torch.cat((as_rows(before), own)).index_select(0, places)
            for before, own in zip(prefix, (key, value), strict=True)
        )
    longest = max(packing.lengths)
    out: Any = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), queries, keys, longest, longest + packing.before,
        **causal_options(varlen_attn, query.shape[-1], scaling, shared=query.shape[1] != key.shape[1]),
    )  # fmt: skip
    return out[None]


def as_rows(states: Tensor) -> Tensor:
    """``(1, H, T, d)`` → ``(T, H, d)``, what the kernel takes."""
    return states[0].transpose(0, 1)


def causal_options(kernel: Callable[..., Any], width: int, scaling: float, shared: bool) -> dict[str, Any]:
    """How this torch's `varlen_attn` is told of causality, scale and shared key heads: 2.10 knows ``is_causal`` alone, 2.11 a window
    and a scale, 2.12 also ``enable_gqa``. What it takes for granted is left out.

    Raises:
        TypeError: what is asked for can't be said.
    """
    known = inspect.signature(kernel).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scaling
    elif not math.isclose(scaling, width**-0.5):
        raise TypeError(f"this torch's varlen_attn scales by {width**-0.5:.4f} and nothing else, not by {scaling:.4f}")
    if shared:
        options["enable_gqa"] = True
    return options


@functools.cache
def variable_length(device: torch.device, dtype: torch.dtype, width: int, groups: int, scaling: float) -> bool:
    """Whether this GPU's kernel is there and gives what one sample at a time gives, forward and backward. Tried once.

    For heads of `width` values, `groups` of them to a key head, and that scaling.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        generator = torch.Generator(device).manual_seed(0)
        make = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)  # noqa: E731
        packed = Packed([37, 5, 130], [(make(1, 4, 11, width), make(1, 4, 11, width))])
        found = []
        q, k, v = (make(1, heads, 172, width).requires_grad_() for heads in (4 * groups, 4, 4))
        with torch.enable_grad():
            for way in (flash, one_by_one):
                out = way(q, k, v, scaling, packed, packed.prefix[0])
                gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
                found.append(torch.cat([t.float().flatten() for t in (out, *gradients)]))
        off = ((found[0] - found[1]).norm() / found[1].norm()).item()
        if off > 0.02:
            raise ValueError(f"off by {off:.3f}")
        return True
    except Exception as error:  # an older torch, an older GPU: slower, not wrong
        logger.info("no variable-length attention kernel here (%s); attention is taken sample by sample", error)
        return False
