"""The beginning that all samples of a template share: the text before the first image, whose keys and values do not change while
the LLM is frozen. They are computed once, and given to the model as a filled KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from train.labels import IGNORE
from visionzip.attach import unwrap
from visionzip.families import family_for

SHORTEST = 8
"""Tokens. For fewer, copying keys and values costs more than it saves."""


class Prefix:
    """Keys and values of `beginning` ``(P,)``, token ids that (nearly) all samples start with; see `common_beginning`.

    Gradients are exact: nothing before the first image depends on what is trained, and what comes after sees the same keys and
    values. What is done to a batch depends on that batch alone, so that a resumed run computes what the first one did.
    Off where the LLM trains, is sharded (ZeRO-3), checkpoints its activations, or has windowed attention.
    """

    def __init__(self, model: nn.Module, llm: str, beginning: Tensor) -> None:
        self.model = unwrap(model)
        family = family_for(self.model)
        self.llm: Any = self.model.get_submodule(llm)
        self.beginning, self.image_token = beginning, family.image_token_id
        text = self.model.config.get_text_config()
        windowed = any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or [])
        self.possible = (
            len(beginning) >= SHORTEST
            and family.plain_positions
            and not windowed
            and not any(p.requires_grad or hasattr(p, "ds_id") for p in self.llm.parameters())
        )
        self.layers: list[tuple[Tensor, Tensor]] = []

    def take_off(self, inputs: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
        """`inputs` and `labels` without the beginning, which is in `inputs["past_key_values"]`; unchanged if a row starts with
        something else."""
        if not self.starts(inputs, labels):
            return inputs, labels
        length = len(self.beginning)
        names = ("input_ids", "position_ids")
        shorter = {name: inputs[name][:, length:] for name in names if inputs.get(name) is not None}
        shorter = {**inputs, **shorter, "past_key_values": self._cache(len(labels))}
        return shorter, labels[:, length:]  # a mask stays as long: it is over keys, the prefix among them

    def starts(self, inputs: dict[str, Any], labels: Tensor) -> bool:
        """Whether all rows start with the beginning; if so, `layers` has its keys and values."""
        ids = inputs.get("input_ids")
        if not self.possible or ids is None or recomputes_activations(self.llm):
            return False
        self.beginning = self.beginning.to(ids.device)
        length = len(self.beginning)
        if min(count_shared(ids, self.beginning), count_unsupervised(ids, labels, self.image_token)) < length:
            return False
        if not self.layers:
            self.layers = self._compute(ids[:1, :length])
        return True

    @torch.no_grad()
    def _compute(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``(1, P)`` → for each layer keys and values ``(1, H, P, d)``."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        self.llm(input_ids=ids, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _cache(self, rows: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
        return cache


def common_beginning(rows: Iterable[tuple[Tensor, Tensor]], image_token: int) -> Tensor:
    """The longest common beginning of the rows' `input_ids` ``(L,)`` without an image and without a supervised token."""
    found: Tensor | None = None
    for ids, labels in rows:
        free = ids[: count_unsupervised(ids[None], labels[None], image_token)]
        found = free if found is None else found[: count_shared(free[None], found)]
    return found if found is not None else torch.empty(0, dtype=torch.long)


def recomputes_activations(llm: nn.Module) -> bool:
    """Whether layers recompute their activations in the backward pass; transformers then ignores a KV cache."""
    return any(getattr(module, "gradient_checkpointing", False) for module in llm.modules())


def count_shared(ids: Tensor, beginning: Tensor) -> int:
    """How many tokens of `beginning` ``(P,)`` all rows of ``(B, L)`` start with."""
    length = min(ids.shape[1], len(beginning))
    same = (ids[:, :length] == beginning[:length]).all(dim=0)
    return length if bool(same.all()) else int((~same).to(torch.uint8).argmax())


def count_unsupervised(ids: Tensor, labels: Tensor, image_token: int) -> int:
    """How many tokens at the start of all rows are no image and predict nothing supervised."""
    stop = (ids == image_token) | (torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE)
    stop = stop.any(dim=0)
    return int(stop.to(torch.uint8).argmax()) if bool(stop.any()) else ids.shape[1] - 1
