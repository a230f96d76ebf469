"""The attention of every layer of a vision encoder, observed while the encoder runs as usual.

The modules of transformers' encoders all call one attention function, chosen by name in their config. During observation, that name refers
to a function that calls the model's usual one and also passes queries and keys to an observer.
So no encoder needs code here, hidden states do not change, and only the maps that are requested are formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from visionzip.analysis.trace import to_model
from visionzip.attach import Attachment
from visionzip.encoders.base import CHUNK
from visionzip.intercept import Scoped

_NAME = "visionzip_watched"


@dataclass(frozen=True)
class Call:
    """One call of one layer's attention. ``B`` images (or 1, with windows one after another), ``H`` heads, ``N`` tokens, ``d`` size of a
    head."""

    module: nn.Module
    queries: Tensor  # (B, H, N, d)
    keys: Tensor  # (B, H, N, d)
    scale: float
    mask: Tensor | None  # added to the logits

    def probabilities(self, chosen: slice) -> Tensor:
        """``(B, H, n, N)`` float32 attention of the queries `chosen`."""
        logits = (self.queries[:, :, chosen] @ self.keys.transpose(-1, -2)) * self.scale
        if self.mask is not None:
            logits = logits + self.mask[..., chosen, : self.keys.shape[2]]
        return logits.softmax(dim=-1, dtype=torch.float32)

    def from_first(self) -> Tensor:
        """``(B, N)``: the attention of token 0 to each token, mean over heads; sums to 1."""
        return self.probabilities(slice(0, 1)).mean(dim=1).squeeze(1)

    def received(self) -> Tensor:
        """``(B, N)``: the attention each token receives, mean over heads and queries; sums to 1. Computed in chunks, without a whole N × N
        map."""
        count = self.queries.shape[2]
        chunks = [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]
        return torch.stack([self.probabilities(chunk).mean(dim=1).sum(dim=1) for chunk in chunks]).sum(dim=0) / count

    def map(self) -> Tensor:
        """``(B, N, N)`` mean over heads: rows are queries, columns are keys."""
        return self.probabilities(slice(None)).mean(dim=1)


_watcher: Scoped[tuple[str, Callable[[Call], None]]] = Scoped("visionzip_watcher")


@contextmanager
def watching(tower: nn.Module, watcher: Callable[[Call], None]) -> Iterator[None]:
    """Inside the block, `watcher` is called with every attention `Call` of `tower` in this thread.

    Raises:
        ValueError: for an encoder whose modules do not select their attention function by config.
    """
    configs: dict[int, Any] = {
        id(m.config): m.config for m in tower.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    if not configs:
        raise ValueError(
            f"the attention of {type(tower).__name__} can't be captured: it is not an encoder from transformers"
        )
    AttentionInterface.register(_NAME, _watched)  # adds a name; what other names stand for stays as it is
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = _NAME
        with _watcher.set((next(iter(before.values())) or "sdpa", watcher)):
            yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _watched(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    found = _watcher.get()
    name = found[0] if found else "sdpa"
    run = ALL_ATTENTION_FUNCTIONS.get(
        name, ALL_ATTENTION_FUNCTIONS["sdpa"]
    )  # "eager" is a function of the model's file
    if found is not None:
        repeat = query.shape[1] // key.shape[1]
        keys = key.repeat_interleave(repeat, dim=1) if repeat > 1 else key
        found[1](Call(module, query, keys, scaling if scaling is not None else query.shape[-1] ** -0.5, attention_mask))
    return run(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def attention_by_layer(attachment: Attachment, inputs: dict[str, Any], every_layer: bool = True) -> list[Tensor]:
    """For each layer ``(tiles, P)``: each patch's share of the attention; rows sum to 1.

        The attention of CLS if there is one, else the attention received from all patches. An encoder that attends within windows gives
    one row with its windows one after another.

        Args:
            inputs: the image inputs of ``forward`` for one image.
            every_layer: include the layers after the one that is read, which the compressed model does not run.
    """
    tower = attachment.model.get_submodule(attachment.family.tower)
    cls = int(getattr(attachment.family.encoder, "has_cls", False))
    rows: dict[nn.Module, list[Tensor]] = {}

    def watch(call: Call) -> None:
        found = call.from_first() if cls else call.received()
        rows.setdefault(call.module, []).append(found[:, cls:].cpu())

    config = attachment.config.model_copy(update={"layer": -1}) if every_layer else attachment.config
    with torch.no_grad(), watching(tower, watch):
        attachment.family.compress(config, **to_model(attachment.model, inputs))
    return [_shares(calls, encoder_rows=cls == 1) for calls in rows.values()]


def _shares(calls: list[Tensor], encoder_rows: bool) -> Tensor:
    """Joins several calls of one layer, which are batches of images (same ``N``, with CLS) or the windows of one image, weighted by
    size."""
    if encoder_rows or all(len(call) > 1 for call in calls):
        found = torch.cat(calls)
    else:
        found = torch.cat([call * call.shape[1] for call in calls], dim=1)
    return found / found.sum(dim=1, keepdim=True).clamp(min=1e-12)


def attention_map(attachment: Attachment, inputs: dict[str, Any]) -> Tensor:
    """``(tiles, N, N)`` attention of the layer that is read, mean over heads; rows are queries. CLS is included if there is one.

    Raises:
        ValueError: if no such map exists, because the layer attends within windows or patches are merged afterwards.
    """
    tower = attachment.model.get_submodule(attachment.family.tower)
    calls: list[Call] = []
    with torch.no_grad(), watching(tower, calls.append):
        attachment.compress(**to_model(attachment.model, inputs))
    if not calls:
        raise ValueError(f"no attention of {type(tower).__name__} was captured for this image")
    last = [call for call in calls if call.module is calls[-1].module]
    sizes = {call.queries.shape[2] for call in last}
    if len(sizes) != 1 or (len(last[0].queries) == 1 and len(last) > 1):
        raise ValueError(
            f"{type(tower).__name__} attends within windows in this layer: there is no map of the whole image"
        )
    return torch.cat([call.map().cpu() for call in last])
