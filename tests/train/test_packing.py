"""Samples in one row without padding give the loss and the gradient of samples in rows of their own."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import tiny_llava
from tests.train.test_loss import IMAGE, batch, beginning, check, model  # noqa: F401
from train.layout import PackedRow
from train.packing import Packed, can_pack, flash, one_by_one, pack, packed_attention, variable_length


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
    check(model, inputs, labels, layout=PackedRow(model.model.language_model, prefix))
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_no_token_of_padding_goes_through_the_llm(model):  # noqa: F811
    inputs, labels = batch()
    seen = []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    check(model, inputs, labels, layout=PackedRow(model.model.language_model))
    check(model, inputs, labels, layout=PackedRow(model.model.language_model, beginning(model)))
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
    assert can_pack(whole, llm)
    with packed_attention(llm):
        assert not can_pack(whole, llm)  # already another implementation
    llm.activation_checkpointing_enable()
    assert not can_pack(whole, llm)
    other = tiny_llava()
    other.config.model_type = "paligemma"  # its pictures' tokens see each other both ways
    assert not can_pack(other, other.model.language_model)


def slow_kernel(
    q, k, v, starts, keys, longest, longest_keys, *, window_size=None, is_causal=None, scale=None, enable_gqa=False
):
    """`varlen_attn` by its documentation: ``(T, H, d)``, sample by sample, the causal mask aligned to the lower right."""
    assert (window_size == (-1, 0)) != bool(is_causal)
    assert q.is_contiguous()
    assert k.is_contiguous()
    assert v.is_contiguous()
    assert max(b - a for a, b in itertools.pairwise(starts)) == longest
    assert max(b - a for a, b in itertools.pairwise(keys)) == longest_keys
    out = []
    for a, b, c, d in zip(starts[:-1], starts[1:], keys[:-1], keys[1:], strict=True):
        queries, key, value = q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1)
        if q.shape[1] != k.shape[1]:
            assert enable_gqa
            key, value = (t.repeat_interleave(q.shape[1] // k.shape[1], 0) for t in (key, value))
        logits = queries @ key.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        later = torch.ones(b - a, d - c, dtype=torch.bool).triu(int(d - c - b + a) + 1)
        out.append((logits.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(out)


KERNELS = {  # what each torch's kernel can be told
    "2.10": lambda q, k, v, a, b, c, d, is_causal=False: slow_kernel(q, k, v, a, b, c, d, is_causal=is_causal),
    "2.11": lambda q, k, v, a, b, c, d, *, scale=None, window_size=(-1, -1): slow_kernel(
        q, k, v, a, b, c, d, scale=scale, window_size=window_size),
    "2.12": slow_kernel,
}  # fmt: skip


@pytest.mark.parametrize("torch_version", list(KERNELS))
@pytest.mark.parametrize("before", [0, 3])
def test_the_variable_length_kernel_is_given_what_one_by_one_computes(monkeypatch, torch_version, before):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=KERNELS[torch_version]))
    torch.manual_seed(0)
    shared = torch_version == "2.12"
    heads = 2 if shared else 4
    q, k, v = (torch.randn(1, h, 12, 8, requires_grad=True) for h in (4, heads, heads))
    prefix = (torch.randn(1, heads, before, 8), torch.randn(1, heads, before, 8)) if before else None
    packed, scaling = Packed([4, 1, 7], [prefix] if prefix else []), 8**-0.5 if torch_version == "2.10" else 0.3
    found = flash(q, k, v, scaling, packed, prefix)
    expected = one_by_one(q, k, v, scaling, packed, prefix)
    assert torch.allclose(found, expected, atol=1e-6)
    weights = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_kernel_that_cannot_be_told_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=KERNELS["2.10"]))
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(TypeError, match=r"scales by 0\.3536"):
        flash(q, q, q, 0.3, Packed([3]), None)
    with pytest.raises(TypeError, match="enable_gqa"):
        flash(q, q[:, :2], q[:, :2], 1 / math.sqrt(8), Packed([3]), None)
    assert not variable_length(torch.device("cpu"), torch.bfloat16, 8, 1, 0.3)
