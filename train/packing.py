"""A micro-batch as one row without padding. Only attention has to know where a sample begins.

Linear layers, norms and MLPs treat each token by itself, so that padding only costs time there. Attention is computed sample by
sample (by one variable-length flash kernel on a GPU that has it): no token sees another sample, and no mask is ever formed.

A sample that is there at several budgets has a row for each. What these rows have in common, the text before the first image, is
then one part of the packed row, and the rest of each row a part that goes on from it: a tree whose branches do not see each other.
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

from data.collate import BRANCHES
from train.labels import IGNORE
from train.prefix import SHORTEST, count_shared, count_unsupervised, recomputes_activations
from visionzip.attach import unwrap
from visionzip.families import family_for

logger = logging.getLogger(__name__)

NAME = "visionzip_packed"


@dataclass
class Packed:
    """Where the parts of a row begin. A part is a sample, or where a sample has several rows, their beginning or the rest of one.

    Attributes:
        lengths: tokens of each part.
        prefix: keys and values ``(1, H, P, d)`` of each layer that all samples see first.
        after: for each part the number of the earlier part that it goes on from; None: it begins a sample.
    """

    lengths: list[int]
    prefix: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    after: list[int | None] = field(default_factory=list)
    _tables: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.after = self.after or [None] * len(self.lengths)

    @property
    def longest(self) -> int:
        """Keys that a part's last token sees, at most."""
        lengths = self.lengths
        seen = [n + (0 if a is None else lengths[a]) for n, a in zip(lengths, self.after, strict=True)]
        return max(seen) + self.before

    @property
    def before(self) -> int:
        return self.prefix[0][0].shape[2] if self.prefix else 0

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Starts of queries and of keys ``(parts + 1,)`` int32, and for each key its place in [prefix, row]. Made once a batch."""
        if self._tables is None:
            queries = list(itertools.accumulate(self.lengths, initial=0))
            own = [list(range(self.before + a, self.before + b)) for a, b in itertools.pairwise(queries)]
            shared = list(range(self.before))
            places = [
                shared + ([] if after is None else own[after]) + part
                for after, part in zip(self.after, own, strict=True)
            ]
            keys = list(itertools.accumulate(map(len, places), initial=0))
            flat = torch.tensor([place for each in places for place in each])
            made = torch.tensor(queries, dtype=torch.int32), torch.tensor(keys, dtype=torch.int32), flat
            self._tables = tuple(table.to(device) for table in made)  # type: ignore[assignment]
        return self._tables  # type: ignore[return-value]


@dataclass(frozen=True)
class Part:
    """Tokens ``start … stop`` of a row; `after`: number of the part before it, see `Packed`."""

    row: int
    start: int
    stop: int
    after: int | None = None


def parts_of(lengths: list[int], branches: list[int], shared: Callable[[slice], int]) -> list[Part]:
    """The parts of a packed row.

    Args:
        lengths: tokens of each row.
        branches: how many rows each sample has, one after the other.
        shared: how many tokens a sample's rows (a slice of all) begin with in common.
    """
    parts: list[Part] = []
    first = 0
    for count in branches:
        rows = range(first, first + count)
        common = shared(slice(first, first + count)) if count > 1 else 0
        if common >= SHORTEST:
            beginning = len(parts)
            parts.append(Part(first, 0, common))
            parts += [Part(row, common, lengths[row], beginning) for row in rows]
        else:
            parts += [Part(row, 0, lengths[row]) for row in rows]
        first += count
    return parts


def pack(
    inputs: dict[str, Any],
    labels: Tensor,
    prefix: list[tuple[Tensor, Tensor]] | None = None,
    image_token: int | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Right-padded ``(B, L)`` inputs and labels → the same samples in one row ``(1, T)``, with `packing` for the attention.

    Images stay in the order of the rows, as the model expects them. Where samples have several rows (`BRANCHES`), the text
    before the first image is there once for all of a sample's rows.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def shared(rows: slice) -> int:
        assert image_token is not None
        return min(count_shared(ids[rows], ids[rows.start]), count_unsupervised(ids[rows], labels[rows], image_token))

    lengths: list[int] = mask.sum(dim=1).tolist()
    parts = parts_of(lengths, inputs.get(BRANCHES) or [1] * len(lengths), shared)
    packed = Packed([part.stop - part.start for part in parts], prefix or [], [part.after for part in parts])
    width = ids.shape[1]
    places = torch.cat([torch.arange(part.start, part.stop) for part in parts])
    rows = torch.repeat_interleave(torch.tensor([part.row for part in parts]), torch.tensor(packed.lengths))
    flat = (rows * width + places).to(ids.device)
    # Nothing before a sample predicts its first token.
    labels = labels.index_fill(1, torch.zeros(1, dtype=torch.long, device=labels.device), IGNORE)
    given = inputs.get("position_ids")
    positions = (places + packed.before).to(ids.device) if given is None else given.flatten()[flat]
    row = {
        **{name: value for name, value in inputs.items() if name != BRANCHES},
        "input_ids": ids.flatten()[flat][None],
        "position_ids": positions[None],
        # Four dimensions: handed through to the attention as it is, which ignores it.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        "packing": packed,
    }
    return row, labels.flatten()[flat][None]


def pack_batch(
    inputs: dict[str, Any], labels: Tensor, prefix: Any = None, image_token: int | None = None
) -> tuple[dict[str, Any], Tensor]:
    """`pack`, without the beginning that is in a `train.prefix.Prefix`, if all rows have it."""
    if prefix is None or not prefix.starts(inputs, labels):
        return pack(inputs, labels, image_token=image_token)
    length = len(prefix.beginning)
    names = ("input_ids", "attention_mask", "position_ids")
    shorter = {name: inputs[name][:, length:] for name in names if inputs.get(name) is not None}
    return pack({**inputs, **shorter}, labels[:, length:], prefix.layers, image_token)


def can_pack(model: nn.Module, llm: nn.Module) -> bool:
    """Whether packing is exact: it replaces plain causal SDPA for positions 0, 1, 2 … (no M-RoPE, no bidirectional attention among
    the tokens of an image). Layers that recompute their activations would see another attention in the backward pass."""
    text: Any = llm.config
    windowed = any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or [])
    plain = family_for(unwrap(model)).plain_positions and text._attn_implementation == "sdpa"
    return plain and not windowed and not recomputes_activations(llm)


@contextmanager
def packed_attention(llm: Any) -> Iterator[None]:
    """Inside, the attention of `llm` treats the parts of a row separately."""
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
    queries, keys, values = (tensor.split(packing.lengths, dim=2) for tensor in (query, key, value))
    for number, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        mask, after = None, packing.after[number]
        if after is not None:
            k, v = torch.cat((keys[after], k), dim=2), torch.cat((values[after], v), dim=2)
        if prefix is not None:
            k, v = torch.cat((prefix[0], k), dim=2), torch.cat((prefix[1], v), dim=2)
        if (seen := k.shape[2] - q.shape[2]) > 0:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(seen)
        out.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shared
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2)


def flash(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, packing: Packed, prefix: tuple[Tensor, Tensor] | None
) -> Tensor:
    """One kernel for all parts; with fewer queries than keys its causal mask ends at the lower right, as a prefix needs."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, places = packing.tables(query.device)
    query, key, value = (as_rows(tensor) for tensor in (query, key, value))
    if prefix is not None:
        key, value = (torch.cat((as_rows(before), own)) for before, own in zip(prefix, (key, value), strict=True))
    if len(places) != query.shape[0]:
        # index_select, not key[places]: the latter's backward sorts the places, which repeat, and waits for the GPU.
        key, value = key.index_select(0, places), value.index_select(0, places)
    longest = max(packing.lengths)
    out: Any = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), queries, keys, longest, packing.longest,
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
        TypeError: the installed torch can't express what is requested.
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
        logger.info("no variable-length attention kernel here (%s); attention is computed sample by sample", error)
        return False
