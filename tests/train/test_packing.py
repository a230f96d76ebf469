"""Samples in one row without padding give the loss and the gradient of samples in rows of their own."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_llava
from tests.train.test_loss import IMAGE, batch, beginning, check, model  # noqa: F401
from train.packing import Packed, one_by_one, pack, packed_attention, possible


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("picture", [True, False])
def test_equal_to_padded_rows(model, shared, picture):  # noqa: F811
    inputs, labels = batch(picture=picture)
    if not picture:  # a projector that is not used has no gradient: one row with a picture
        first, first_labels = batch(rows=1, seed=3)
        wide = max(inputs["input_ids"].shape[1], first["input_ids"].shape[1])
        pad = lambda t, value: torch.nn.functional.pad(t, (0, wide - t.shape[1]), value=value)  # noqa: E731
        inputs = {
            "input_ids": torch.cat([pad(inputs["input_ids"], 3), pad(first["input_ids"], 3)]),
            "attention_mask": torch.cat([pad(inputs["attention_mask"], 0), pad(first["attention_mask"], 0)]),
            "pixel_values": first["pixel_values"],
        }
        labels = torch.cat([pad(labels, -100), pad(first_labels, -100)])
    prefix = beginning(model) if shared else None
    check(model, inputs, labels, packed=model.model.language_model, prefix=prefix)
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_no_token_of_padding_goes_through_the_llm(model):  # noqa: F811
    inputs, labels = batch()
    seen = []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    check(model, inputs, labels, packed=model.model.language_model)
    check(model, inputs, labels, packed=model.model.language_model, prefix=beginning(model))
    rows, longest = inputs["input_ids"].shape
    real = int(inputs["attention_mask"].sum())
    assert [shape[:2] for shape in seen] == [
        (rows, longest),
        (1, real),
        (rows, longest),
        (1, 12),
        (1, real - 12 * rows),
    ]


def test_a_row_knows_where_its_samples_begin():
    inputs, labels = batch()
    labels[:, 0] = 5
    row, packed_labels = pack(inputs, labels)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert row["packing"].lengths == lengths
    assert row["input_ids"].shape == packed_labels.shape == (1, sum(lengths))
    assert row["position_ids"][0].tolist() == [place for length in lengths for place in range(length)]
    assert (packed_labels[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] == -100).all()


def test_attention_stays_inside_a_sample():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    before = (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    packed = Packed([4, 5], [before])
    whole = one_by_one(q, k, v, 0.3, packed, before)
    k[:, :, 5], v[:, :, 5] = 100.0, 100.0
    changed = one_by_one(q, k, v, 0.3, packed, before)
    assert torch.equal(whole[:, :5], changed[:, :5])
    assert not torch.isclose(whole[:, 5:], changed[:, 5:]).all(dim=-1).any()
    starts, keys, places = packed.tables(q.device)
    assert starts.tolist() == [0, 4, 9]
    assert keys.tolist() == [0, 7, 15]
    assert places.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 7, 8, 9, 10, 11]


def test_where_packing_is_not_possible():
    whole = tiny_llava()
    llm = whole.model.language_model
    assert possible(whole, llm)
    with packed_attention(llm):
        assert not possible(whole, llm)  # already another implementation
    llm.activation_checkpointing_enable()
    assert not possible(whole, llm)
    other = tiny_llava()
    other.config.model_type = "paligemma"  # its pictures' tokens see each other both ways
    assert not possible(other, other.model.language_model)
