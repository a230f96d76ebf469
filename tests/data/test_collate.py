"""Batches: padding, images of all families' shapes, and a blank image where there is none."""

from __future__ import annotations

import pytest
import torch

from data.collate import Collator, merge_images
from data.sample import NO_SAMPLE, Rejection
from data.template import IGNORE
from tests.data import kit


@pytest.fixture
def data(tmp_path):
    image = kit.write_image(tmp_path / "a.png")
    rows = [kit.record(0, image), kit.record(1, answer="A very long answer about nothing."), kit.record(2, image)]
    return kit.dataset(tmp_path, kit.write_json(tmp_path / "a.json", rows))


def test_rows_are_padded_on_the_right(data):
    items = [data[0], data[1]]
    batch = data.collator()(items)
    length = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, length)
    for row, item in enumerate(items):
        used = len(item["input_ids"])
        assert batch["input_ids"][row, :used].tolist() == item["input_ids"].tolist()
        assert batch["attention_mask"][row].tolist() == [1] * used + [0] * (length - used)
        assert set(batch["labels"][row, used:].tolist()) <= {IGNORE}
    assert torch.equal(batch["pixel_values"], items[0]["pixel_values"])
    assert "rejections" not in batch


def test_a_batch_without_images_gets_a_blank_one(data):
    batch = data.collator()([data[1]])
    assert batch["input_ids"].shape[0] == 2
    image = data.encoder.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert batch["input_ids"][1, : kit.PLACEHOLDERS].tolist() == [image] * kit.PLACEHOLDERS
    assert batch["attention_mask"][1].sum() == kit.PLACEHOLDERS
    assert batch["labels"][1].eq(IGNORE).all()
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


def test_what_is_no_item_is_left_out_and_told(data):
    rejection = Rejection("r9", "a", 9, "file missing", "a.png")
    batch = data.collator()([NO_SAMPLE, rejection, data[0]])
    assert batch["input_ids"].shape[0] == 1
    assert batch["rejections"] == [{"id": "r9", "source": "a", "index": 9, "reason": "file missing", "detail": "a.png"}]
    alone = data.collator()([NO_SAMPLE, NO_SAMPLE])
    assert alone["labels"].eq(IGNORE).all()
    assert alone["pixel_values"].shape[0] == 1


def test_tiles_are_padded_and_patches_are_not():
    """LLaVA-NeXT: tiles on dim 1, as many as the largest image's. Qwen: patches of all images on dim 0."""
    rows = [
        {"pixel_values": torch.ones(1, 3, 2), "image_sizes": torch.tensor([[1, 2]])},
        {"input_ids": torch.tensor([1])},
        {"pixel_values": torch.ones(2, 5, 2), "image_sizes": torch.tensor([[3, 4], [5, 6]])},
    ]
    merged = merge_images(rows)
    assert merged["pixel_values"].shape == (3, 5, 2)
    assert merged["pixel_values"].sum(dim=(1, 2)).tolist() == [6, 10, 10]
    assert merged["image_sizes"].tolist() == [[1, 2], [3, 4], [5, 6]]
    patches = merge_images([{"pixel_values": torch.ones(4, 6)}, {"pixel_values": torch.ones(8, 6)}])
    assert patches["pixel_values"].shape == (12, 6)


def test_visual_tokens_of_a_cache_stay_a_list():
    rows = [{"visual_tokens": [torch.zeros(3, 2)]}, {"visual_tokens": [torch.zeros(5, 2), torch.zeros(3, 2)]}]
    assert [len(tokens) for tokens in merge_images(rows)["visual_tokens"]] == [3, 5, 3]


def test_token_types_are_made_where_the_processor_wants_them(data):
    using = data.encoder.processor
    using.return_mm_token_type_ids = True
    batch = data.collator()([data[0], data[1]])
    image = using.tokenizer.convert_tokens_to_ids("<image>")
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == image)
    assert data.collator()([data[1]])["mm_token_type_ids"][1].sum() == kit.PLACEHOLDERS


def test_a_processor_without_a_padding_token_will_do(data):
    data.encoder.processor.tokenizer.pad_token = None
    batch = Collator(data.encoder.processor, data.images)([data[0], data[1]])
    assert batch["input_ids"].min() >= 0
