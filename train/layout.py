"""How the samples of a micro-batch are laid out for the model: padded rows, or one packed row; either without a shared beginning.

One choice for a whole run (`choose_layout`). What is done to a batch depends on that batch alone, so that a resumed run computes
what the interrupted one would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from data.collate import BRANCHES
from train import packing
from train.prefix import Prefix, common_beginning
from visionzip import attached

LOOKED_AT = 64
"""Samples in which a shared beginning is looked for."""


@dataclass(frozen=True)
class PaddedRows:
    """A row for each sample, padded on the right to the longest.

    Attributes:
        prefix: takes off what all rows begin with.
        masked: hand the attention mask to the model. A causal model with plain positions does without: a real token sees none of
            the padding on its right, and nothing that the padding computes is used.
    """

    prefix: Prefix | None = None
    masked: bool = True

    @contextmanager
    def lay_out(self, inputs: dict[str, Any], labels: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Collated inputs and labels ``(B, L)`` → those for the model's forward, which has to run inside."""
        left_out = (BRANCHES,) if self.masked else (BRANCHES, "attention_mask")
        inputs = {name: value for name, value in inputs.items() if name not in left_out}
        if self.prefix is not None:
            inputs, labels = self.prefix.take_off(inputs, labels)
        yield inputs, labels

    def describe(self) -> list[str]:
        return ["padded batches", *describe_prefix(self.prefix)]


@dataclass(frozen=True)
class PackedRow:
    """All samples in one row ``(1, T)`` without padding (`train.packing`).

    Attributes:
        llm: the model's LLM, whose attention works sample by sample meanwhile.
        prefix: takes off what all samples begin with.
        image_token: id of an image's placeholders; needed where samples have several rows (`data.collate.BRANCHES`).
    """

    llm: nn.Module
    prefix: Prefix | None = None
    image_token: int | None = None

    @contextmanager
    def lay_out(self, inputs: dict[str, Any], labels: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Collated inputs and labels ``(B, L)`` → those for the model's forward, which has to run inside."""
        packed = packing.pack_batch(inputs, labels, self.prefix, self.image_token)
        with packing.packed_attention(self.llm):
            yield packed

    def describe(self) -> list[str]:
        return ["samples packed into rows without padding", *describe_prefix(self.prefix)]


Layout = PaddedRows | PackedRow


def choose_layout(model: Any, batching: str, prefix: Prefix | None = None, recomputes: bool = False) -> Layout:
    """The fastest layout that is exact for this attached model.

    Args:
        batching: `data.batching`; one row for all samples only where it is "packed".
        recomputes: whether layers run again in the backward pass, where another attention would be used.
    """
    attachment = attached(model)
    assert attachment is not None
    llm = model.get_submodule(attachment.family.llm)
    if batching == "packed" and not recomputes and packing.can_pack(model, llm):
        return PackedRow(llm, prefix, attachment.family.image_token_id)
    return PaddedRows(prefix, masked=not attachment.family.plain_positions)


def find_prefix(model: Any, dataset: Any) -> Prefix | None:
    """What the first samples of `dataset` begin with; None where there is nothing, or it can't be shared exactly."""
    items = [item for index in range(min(len(dataset), LOOKED_AT)) if isinstance(item := dataset[index], dict)]
    rows = [(item["input_ids"], item["labels"]) for item in items]
    if not rows:
        return None
    family = attached(model).family  # type: ignore[union-attr]
    prefix = Prefix(model, family.llm, common_beginning(rows, family.image_token_id))
    return prefix if prefix.possible else None


def describe_prefix(prefix: Prefix | None) -> list[str]:
    return [] if prefix is None else [f"the first {len(prefix.beginning)} tokens computed once"]
