"""Counted, not timed: what one training step makes the machine do. A regression shows on any machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train.loss
from data.collate import Collator
from tests.tiny import tiny_llava, tiny_processor
from tests.train.test_loss import batch, beginning
from train.labels import count_supervised
from train.layout import PackedRow
from train.loss import FrozenHeadLoss, summed_loss
from train.losses import LOSSES
from visionzip import attach, attached
from visionzip.encoders.base import CHUNK, attention_received

LAYERS, HEADS = 2, 4


@pytest.fixture
def zipped():
    model = tiny_llava(layers=5).requires_grad_(False)
    attach(model, dominant=5, contextual=2)
    attached(model).shortener.remove()
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def rows_seen(module: nn.Module) -> list[int]:
    """Tokens that go through `module`, a call each."""
    seen: list[int] = []
    module.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    return seen


def test_tokens_through_the_llm_are_the_real_ones_behind_the_prefix(zipped):
    inputs, labels = batch()
    prefix = beginning(zipped)
    prefix.starts(inputs, labels)  # computed once for a whole run
    seen = [rows_seen(layer.mlp.down_proj) for layer in zipped.model.language_model.layers]
    summed_loss(zipped, zipped.lm_head, inputs, labels, PackedRow(zipped.model.language_model, prefix)).backward()
    expected = int(inputs["attention_mask"].sum()) - len(labels) * len(prefix.beginning)
    assert seen == [[expected]] * LAYERS


def test_logits_are_computed_where_there_is_a_label_and_once(zipped, monkeypatch):
    inputs, labels = batch()
    counted: list[int] = []
    inner = LOSSES["cross_entropy"]
    monkeypatch.setitem(
        LOSSES._entries,
        "cross_entropy",
        lambda logits, targets: (counted.append(len(logits)), inner(logits, targets))[1],
    )
    monkeypatch.setattr(train.loss, "CHUNK_BYTES", 4 * 20 * 4)
    head = rows_seen(zipped.lm_head)
    summed_loss(zipped, zipped.lm_head, inputs, labels).backward()
    assert sum(counted) == count_supervised(labels)
    assert max(counted) <= 4  # the chunk: never all of them at once
    assert head == [0]


def test_layers_of_the_encoder(zipped):
    """Read is layer -2: four of the five layers run, once a batch, none with gradients, none making a map."""
    inputs, labels = batch()
    tower = zipped.model.vision_tower
    ran: list[int] = []
    maps: list[object] = []
    for number, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda module, args, out, number=number: ran.append(number))
        layer.self_attn.register_forward_hook(lambda module, args, out: maps.append(out[1]))
    summed_loss(zipped, zipped.lm_head, inputs, labels).backward()
    assert ran == [0, 1, 2, 3]
    assert maps == [None] * 4


def test_with_the_cache_the_encoder_and_the_files_are_left_alone(zipped, monkeypatch):
    from data.cache.reader import VISUAL
    from train.cached import read_from_cache

    inputs, labels = batch()
    tokens = attached(zipped).compress(pixel_values=inputs["pixel_values"])
    plain = summed_loss(zipped, zipped.lm_head, dict(inputs), labels)
    plain.backward()
    expected = [p.grad.clone() for p in zipped.model.multi_modal_projector.parameters()]
    zipped.zero_grad()
    read_from_cache(zipped)
    ran = rows_seen(zipped.model.vision_tower.embeddings)
    del inputs["pixel_values"]
    loss = summed_loss(
        zipped, zipped.lm_head, {**inputs, VISUAL: tokens}, labels, PackedRow(zipped.model.language_model)
    )
    loss.backward()
    assert ran == []
    assert torch.allclose(loss, plain, rtol=1e-6)
    for parameter, gradient in zip(zipped.model.multi_modal_projector.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() / gradient.norm() < 1e-5


class Saved:
    """Bytes that autograd keeps for the backward pass, weights not counted, each piece of memory once."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        self.kept: dict[int, int] = {}

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self.hooks.__exit__(*args)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.kept.values())


def test_bytes_kept_for_the_backward_pass(zipped):
    """Nothing of a frozen layer's inputs but what its own arithmetic needs, and nothing of the vocabulary's size."""
    inputs, labels = batch(rows=6)
    llm, text = zipped.model.language_model, zipped.config.text_config

    def kept(*layout) -> int:
        with Saved(zipped) as saved:
            summed_loss(zipped, zipped.lm_head, dict(inputs), labels, *layout)
        return saved.bytes

    tokens = int(inputs["attention_mask"].sum())
    # A layer: two norms (input, scale), q, k, v and the attention's output, gate, its activation, up; in float32. Behind the
    # layers and in the projector three more tensors as wide as the model.
    wide = 2 * text.hidden_size + 2 * text.hidden_size + 2 * (HEADS // 2) * 12 + 3 * text.intermediate_size
    allowed = 4 * tokens * (LAYERS * (wide + 16) + 3 * text.hidden_size)
    frozen = kept(PackedRow(llm))
    assert frozen <= allowed
    assert frozen < kept()  # padding
    assert kept(PackedRow(llm, beginning(zipped))) < frozen
    llm.requires_grad_(True)
    assert kept(PackedRow(llm)) > 1.3 * frozen
    assert kept(PackedRow(llm)) > allowed


def test_nothing_of_the_vocabularys_size_is_kept():
    rows, head = torch.randn(6, 8, requires_grad=True), nn.Linear(8, 1000, bias=False).requires_grad_(False)
    with Saved(head) as saved:
        FrozenHeadLoss.apply(rows, head.weight, torch.arange(6))
    assert saved.bytes == rows.nbytes


class Largest(TorchDispatchMode):
    """Values of the largest tensor that any operation gives."""

    values = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        self.values = max([self.values, *(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor))])
        return out


def test_no_map_of_all_tokens_without_cls():
    """729 tokens, as SigLIP so400m has them at 384 pixels: attention received is summed over parts of the map."""
    queries, keys = torch.randn(2, 3, 729, 8), torch.randn(2, 3, 729, 8)
    with Largest() as seen:
        attention_received(queries, keys, 0.3)
    assert seen.values == 2 * 3 * CHUNK * 729
    assert seen.values < 2 * 3 * 729 * 729 / 2


def test_text_alone_reads_one_blank_image_for_a_whole_batch():
    """Every rank runs the projector in every step, at the price of one small row."""
    from data.config import DataConfig
    from data.images import PixelImages

    processor = tiny_processor()
    attach(tiny_llava(), processor, dominant=5, contextual=2)
    images = PixelImages(DataConfig(sources=[{"path": "x.json"}]), processor)
    text = {"input_ids": torch.arange(5, 15), "labels": torch.arange(5, 15)}
    both = Collator(processor, images)([text, text])
    assert both["input_ids"].shape == (3, 10)
    assert both["pixel_values"].shape[0] == 1
    assert int(both["attention_mask"].sum()) == 20 + 7
