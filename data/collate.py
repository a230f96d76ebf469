"""Items → batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from data.pictures import LoadPictures
from data.sample import NO_SAMPLE, Rejection
from data.template import IGNORE

TEXT_KEYS = ("input_ids", "labels", "mm_token_type_ids", "token_type_ids")
ANSWER_KEYS = ("teacher_words", "teacher_log_probs")  # a row for each predicted token: all rows' one after the other


class Collator:
    """`input_ids, attention_mask, labels (B, L)` and the image inputs of all rows, concatenated on dim 0.

    Padding index and rejected items are left out; `batch["rejections"]` lists the latter, as dicts, where there are any. A batch
    without any picture gets one more row, made of a blank picture's placeholders and supervised nowhere, with that picture's
    inputs: so every rank runs the projector in every step, which ZeRO and DDP rely on.
    """

    def __init__(self, processor: Any, pictures: LoadPictures) -> None:
        self.processor = processor
        self.pictures = pictures
        tokenizer = getattr(processor, "tokenizer", processor)
        # A pad id that is never looked at (the attention mask is 0 there) only has to be a row of the embedding.
        self.pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self._blank: dict[str, Any] | None = None

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        rejections = [item.as_dict() for item in items if isinstance(item, Rejection)]
        rows = [item for item in items if not isinstance(item, Rejection) and item is not NO_SAMPLE]
        if not any(picture_keys(row) for row in rows):
            rows.append(self.blank_row())
        batch: dict[str, Any] = {**self._text(rows), **merge_pictures(rows)}
        batch |= {
            key: torch.cat([row[key] for row in rows if key in row])
            for key in ANSWER_KEYS
            if any(key in row for row in rows)
        }
        if rejections:
            batch["rejections"] = rejections
        return batch

    def blank_row(self) -> dict[str, Any]:
        """A row that is one blank picture; made once."""
        if self._blank is None:
            pictures = self.pictures.blank()
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            ids = tokenizer(pictures.placeholders[0], add_special_tokens=False)["input_ids"]
            self._blank = {
                **text_item(self.processor, ids, [IGNORE] * len(ids)),
                **pictures.inputs,
            }
        return self._blank

    def _text(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_id, "labels": IGNORE}
        batch = {
            key: torch.stack([pad(row[key], length, fill.get(key, 0)) for row in rows])
            for key in TEXT_KEYS
            if key in rows[0]
        }
        batch["attention_mask"] = torch.stack([pad(torch.ones_like(row["input_ids"]), length, 0) for row in rows])
        return batch


def text_item(processor: Any, ids: list[int], labels: list[int] | None) -> dict[str, torch.Tensor]:
    """The text part of an item (L,), with the token types the processor's model wants, under the name it wants them."""
    item = {"input_ids": torch.tensor(ids, dtype=torch.long)}
    if labels is not None:
        item["labels"] = torch.tensor(labels, dtype=torch.long)
    wants_types = adds_token_type_ids(processor)
    if getattr(processor, "return_mm_token_type_ids", False):  # which modality: Qwen's positions, Gemma 3's mask
        name = "token_type_ids" if wants_types else "mm_token_type_ids"
        item[name] = torch.tensor(processor.create_mm_token_type_ids([ids])[0], dtype=torch.long)
    elif wants_types:  # PaliGemma: up to the first answer tokens attend both ways (0), then to what is before them (1)
        answers = torch.zeros(len(ids), dtype=torch.long) if labels is None else (item["labels"] != IGNORE).long()
        item["token_type_ids"] = answers.cummax(0).values if len(ids) else answers
    return item


def adds_token_type_ids(processor: Any) -> bool:
    """Whether the processor itself, not one of its parts (most tokenizers name it), has `token_type_ids` among its outputs."""
    if not isinstance(processor, ProcessorMixin):
        return False
    parts = ProcessorMixin.model_input_names.fget(processor)  # type: ignore[attr-defined]
    return list(processor.model_input_names).count("token_type_ids") > list(parts).count("token_type_ids")


def picture_keys(row: dict[str, Any]) -> list[str]:
    return [key for key in row if key not in TEXT_KEYS and key not in ANSWER_KEYS]


def merge_pictures(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate the rows' image inputs on dim 0 (lists are joined). Where dim 1 differs (tiles), shorter ones get zeros."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for key in picture_keys(row):
            found.setdefault(key, []).append(row[key])
    return {key: _concatenate(values) for key, values in found.items()}


def _concatenate(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [element for value in values for element in value]
    if values[0].ndim > 1 and len({value.shape[1] for value in values}) > 1:
        longest = max(value.shape[1] for value in values)
        values = [
            value
            if value.shape[1] == longest
            else torch.cat([value, value.new_zeros(value.shape[0], longest - value.shape[1], *value.shape[2:])], dim=1)
            for value in values
        ]
    return torch.cat(values)


def pad(row: torch.Tensor, length: int, value: int, left: bool = False) -> torch.Tensor:
    fill = row.new_full((length - len(row),), value)
    return torch.cat([fill, row] if left else [row, fill])
