"""Samples in one row without padding give the loss and the gradient of samples in rows of their own."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from data.cache.reader import VISUAL
from data.collate import BRANCHES
from tests.tiny import tiny_llava
from tests.train.test_loss import IMAGE, PAD, batch, beginning, check, model, plain_loss  # noqa: F401
from train.cached import read_from_cache
from train.layout import PackedRow, PaddedRows
from train.loss import summed_loss
from train.packing import Packed, can_pack, flash, one_by_one, pack, packed_attention, variable_length


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("image", [True, False])
def test_equal_to_padded_rows(model, shared, image):  # noqa: F811
    inputs, labels = batch(image=image)
    if not image:  # a projector that is not used has no gradient: one row with an image
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


BUDGETS = (3, 7, 12)


def several_budgets(system: int, samples: int = 2):
    """Rows of each sample at each of `BUDGETS`, behind a system prompt of each sample's own, but for its first tokens."""
    draw = torch.Generator().manual_seed(4)
    start = torch.randint(5, 20, (12,), generator=torch.Generator().manual_seed(7))
    ids, labels, images = [], [], []
    for sample in range(samples):
        before = torch.cat([start, torch.randint(5, 20, (system - 12,), generator=draw)])
        text = torch.randint(5, 20, (9 + 4 * sample,), generator=draw)
        for budget in BUDGETS:
            ids.append(torch.cat([before, torch.full((budget,), IMAGE), text]))
            labels.append(torch.where(torch.arange(len(ids[-1])) >= len(ids[-1]) - 5, ids[-1], -100))
            images.append(torch.randn(budget, 32, generator=draw))
    longest = max(map(len, ids))
    pad = lambda row, value: torch.nn.functional.pad(row, (0, longest - len(row)), value=value)  # noqa: E731
    inputs = {
        "input_ids": torch.stack([pad(row, PAD) for row in ids]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), 0) for row in ids]),
        VISUAL: images,
    }
    return inputs, torch.stack([pad(row, -100) for row in labels])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_several_budgets_of_a_sample_are_those_of_each_apart(model, shared, packed):  # noqa: F811
    """Loss and gradient, also of the LLM's weights, which the shared beginning depends on."""
    llm = model.model.language_model
    prefix = beginning(model) if shared else None
    read_from_cache(model)
    inner = llm.layers[0].self_attn.q_proj.weight
    if not shared:
        inner.requires_grad_(True)
    inputs, labels = several_budgets(system=30)
    apart = 0.0
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, :length], VISUAL: inputs[VISUAL][row : row + 1]}
        apart += plain_loss(model, alone, labels[row : row + 1, :length])
    trains = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(apart, trains)
    seen = []
    llm.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    together = {**inputs, BRANCHES: [len(BUDGETS)] * 2}
    layout = PackedRow(llm, prefix, IMAGE) if packed else PaddedRows(prefix, masked=False)
    loss = summed_loss(model, model.lm_head, together, labels, layout)
    assert abs(loss - apart) / abs(apart) < 1e-5
    for a, b in zip(torch.autograd.grad(loss, trains), expected, strict=True):
        assert (a - b).norm() / b.norm() < 1e-5
    real, own = int(inputs["attention_mask"].sum()), 30 - 12 * shared
    if packed:
        assert seen[-1] == real - 12 * shared * 6 - own * 2 * 2  # of three beginnings of a sample one is left


def test_work_is_halved_where_what_stands_before_the_image_is_long(model):  # noqa: F811
    """P tokens before the image, b visual tokens and T behind them: P + Σb + nT in place of nP + Σb + nT."""
    inputs, labels = several_budgets(system=60)
    apart = int(inputs["attention_mask"].sum())
    row, _ = pack({**inputs, BRANCHES: [3, 3]}, labels, image_token=IMAGE)
    assert row["input_ids"].shape[1] <= apart / 2
    positions, packing = row["position_ids"][0], row["packing"]
    assert packing.after == [None, 0, 0, 0, None, 4, 4, 4]
    starts = [int(part[0]) for part in positions.split(packing.lengths)]
    assert starts == [0, 60, 60, 60] * 2, "each branch goes on where the beginning ends"


def test_rows_that_have_little_in_common_stay_apart():
    inputs, labels = several_budgets(system=30, samples=1)
    inputs["input_ids"][1, 7] = 20 - inputs["input_ids"][1, 7]  # a row that parts from the others after seven tokens
    row, _ = pack({**inputs, BRANCHES: [3]}, labels, image_token=IMAGE)
    assert row["packing"].after == [None] * 3


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
    other.config.model_type = "paligemma"  # its images' tokens see each other both ways
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
@pytest.mark.parametrize("after", [[None] * 3, [None, None, 0], [None, 0, 0]])
def test_the_variable_length_kernel_is_given_what_one_by_one_computes(monkeypatch, torch_version, before, after):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=KERNELS[torch_version]))
    torch.manual_seed(0)
    shared = torch_version == "2.12"
    heads = 2 if shared else 4
    q, k, v = (torch.randn(1, h, 12, 8, requires_grad=True) for h in (4, heads, heads))
    prefix = (torch.randn(1, heads, before, 8), torch.randn(1, heads, before, 8)) if before else None
    packed, scaling = Packed([4, 1, 7], [prefix] if prefix else [], after), 8**-0.5 if torch_version == "2.10" else 0.3
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
