"""Items → batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from data.images import LoadImages
from data.sample import NO_SAMPLE, Rejection
from data.template import IGNORE
from visionzip.inputs import merge_image_inputs, pad_row, text_inputs

TEXT_KEYS = ("input_ids", "labels", "mm_token_type_ids", "token_type_ids")


BRANCHES = "branches"
"""In a batch where samples have several rows: how many each has, one after the other."""


class Branches(list[dict[str, Any]]):
    """A sample at several budgets: an item for each."""


class Collator:
    """`input_ids, attention_mask, labels (B, L)` and the image inputs of all rows, concatenated on dim 0.

    Padding index and rejected items are left out; `batch["rejections"]` lists the latter, as dicts, where there are any. A batch
    without any image gets one more row, made of a blank image's placeholders and supervised nowhere, with that image's
    inputs: so every rank runs the projector in every step, which ZeRO and DDP rely on. `Branches` become a row each; how many
    belong together is then in ``batch["branches"]``.
    """

    def __init__(self, processor: Any, images: LoadImages) -> None:
        self.processor = processor
        self.images = images
        tokenizer = getattr(processor, "tokenizer", processor)
        # A pad id that is never read (the attention mask is 0 there) only has to be a row of the embedding.
        self.pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self._blank: dict[str, Any] | None = None

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        rejections = [item.as_dict() for item in items if isinstance(item, Rejection)]
        items = [item for item in items if not isinstance(item, Rejection) and item is not NO_SAMPLE]
        rows = [row for item in items for row in (item if isinstance(item, Branches) else [item])]
        branches = [len(item) if isinstance(item, Branches) else 1 for item in items]
        if not any(image_keys(row) for row in rows):
            rows.append(self.blank_row())
            branches.append(1)
        batch: dict[str, Any] = {**self._text(rows), **merge_images(rows)}
        if any(count > 1 for count in branches):
            batch[BRANCHES] = branches
        if rejections:
            batch["rejections"] = rejections
        return batch

    def blank_row(self) -> dict[str, Any]:
        """A row that is one blank image; made once."""
        if self._blank is None:
            images = self.images.blank()
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            ids = tokenizer(images.placeholders[0], add_special_tokens=False)["input_ids"]
            self._blank = {
                **text_item(self.processor, ids, [IGNORE] * len(ids)),
                **images.inputs,
            }
        return self._blank

    def _text(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_id, "labels": IGNORE}
        batch = {
            key: torch.stack([pad_row(row[key], length, fill.get(key, 0)) for row in rows])
            for key in TEXT_KEYS
            if key in rows[0]
        }
        batch["attention_mask"] = torch.stack([pad_row(torch.ones_like(row["input_ids"]), length, 0) for row in rows])
        return batch


def text_item(processor: Any, ids: list[int], labels: list[int] | None) -> dict[str, torch.Tensor]:
    """The text part of an item (L,), with the token types the processor's model wants, under the name it wants them."""
    if labels is None:
        return text_inputs(processor, ids)
    label = torch.tensor(labels, dtype=torch.long)
    return {**text_inputs(processor, ids, label != IGNORE), "labels": label}


def image_keys(row: dict[str, Any]) -> list[str]:
    return [key for key in row if key not in TEXT_KEYS]


def merge_images(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The rows' image inputs, concatenated on dim 0."""
    return merge_image_inputs(rows, but=TEXT_KEYS)
