"""The loss and the projector's gradient equal those of a plain forward with full logits, whatever is saved on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.tiny import tiny_llava
from train.config import TrainSection
from train.layout import PaddedRows
from train.loss import FrozenHeadLoss, LogitsLoss, can_fuse, summed_loss
from train.losses import LOSSES, with_autograd
from train.prefix import Prefix, common_beginning
from visionzip import attach, attached

IMAGE, PAD, KEPT = 4, 3, 7


@pytest.fixture
def model():
    model = tiny_llava().requires_grad_(False)
    attach(model, dominant=5, contextual=2)
    attached(model).shortener.remove()  # prompts here are short already
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def batch(rows: int = 3, *, system: int = 12, seed: int = 0, image: bool = True, ragged: bool = True):
    """A system prompt, an image, text of several lengths, right-padded; answers at different places."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(5, 20, (system,), generator=torch.Generator().manual_seed(7))
    ids, labels = [], []
    for row in range(rows):
        text = torch.randint(5, 20, (9 + (5 * row if ragged else 0),), generator=draw)
        ids.append(torch.cat([start, torch.full((KEPT * image,), IMAGE), text]))
        mask = torch.arange(len(ids[-1])) >= len(ids[-1]) - 5 - row
        mask |= torch.arange(len(ids[-1])) == system + KEPT * image + 3
        labels.append(torch.where(mask, ids[-1], -100))
    longest = max(len(row) for row in ids)
    pad = lambda row, value: functional.pad(row, (0, longest - len(row)), value=value)  # noqa: E731
    inputs = {
        "input_ids": torch.stack([pad(row, PAD) for row in ids]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), 0) for row in ids]),
    }
    if image:
        inputs["pixel_values"] = torch.randn(rows, 3, 32, 32, generator=draw)
    return inputs, torch.stack([pad(row, -100) for row in labels])


def plain(model, inputs, labels):
    """Full logits, mask, nothing clever."""
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum")
    return loss, torch.autograd.grad(loss, projector(model))


def projector(model):
    return list(model.model.multi_modal_projector.parameters())


def check(model, inputs, labels, **options):
    expected, gradient = plain(model, inputs, labels)
    loss = summed_loss(model, model.lm_head, dict(inputs), labels, **options)
    found = torch.autograd.grad(loss, projector(model))
    assert abs(loss - expected) / abs(expected) < 1e-5
    for a, b in zip(found, gradient, strict=True):
        assert (a - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_equal_to_full_logits(model, masked, shared):
    prefix = beginning(model) if shared else None
    check(model, *batch(), layout=PaddedRows(prefix, masked))
    assert prefix is None or prefix.layers[0][0].shape[2] == 12


def test_in_chunks(model, monkeypatch):
    monkeypatch.setattr("train.loss.CHUNK_BYTES", 20 * 4 * 3)  # three rows of a 20-word vocabulary
    check(model, *batch())


def test_a_head_that_trains_or_caps_goes_the_other_way(model):
    model.config.text_config.final_logit_softcapping = 30.0  # known to no LLaVA: says only that the model must be asked
    check(model, *batch())
    model.config.text_config.final_logit_softcapping = None
    model.lm_head.requires_grad_(True)
    inputs, labels = batch()
    expected, _ = plain(model, inputs, labels)
    expected_head = torch.autograd.grad(plain_loss(model, inputs, labels), model.lm_head.weight)[0]
    loss = summed_loss(model, model.lm_head, inputs, labels)
    found = torch.autograd.grad(loss, model.lm_head.weight)[0]
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert (found - expected_head).norm() / expected_head.norm() < 1e-5


def test_a_wrapped_model_is_asked_too(model):
    """As DDP and DeepSpeed wrap it: the one has no config, the other a config of its own."""
    ddp, engine = nn.Module(), nn.Module()
    ddp.module = engine.module = model
    engine.config = {"train_batch_size": 8}
    assert can_fuse(ddp, model.lm_head)
    assert can_fuse(engine, model.lm_head)
    model.config.text_config.final_logit_softcapping = 30.0
    assert not can_fuse(ddp, model.lm_head)
    assert not can_fuse(engine, model.lm_head)


def plain_loss(model, inputs, labels):
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum")


def test_no_label_no_loss_and_a_gradient_of_zero(model):
    inputs, labels = batch()
    loss = summed_loss(model, model.lm_head, inputs, torch.full_like(labels, -100))
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, projector(model)))


def beginning(model) -> Prefix:
    inputs, labels = batch(rows=5, seed=9)
    return Prefix(model, "model.language_model", common_beginning(zip(inputs["input_ids"], labels, strict=True), IMAGE))


def test_what_is_shared_ends_before_the_image_before_the_labels_and_where_rows_part():
    inputs, labels = batch()
    rows = list(zip(inputs["input_ids"], labels, strict=True))
    assert len(common_beginning(rows, IMAGE)) == 12
    inputs["input_ids"][1, 9] = 19
    assert len(common_beginning(rows, IMAGE)) == 9
    labels[2, 6] = 3  # predicted from place 5
    assert len(common_beginning(rows, IMAGE)) == 5


def test_rows_that_start_otherwise_go_without(model):
    prefix = beginning(model)
    check(model, *batch(), layout=PaddedRows(prefix))
    inputs, labels = batch(seed=4)
    inputs["input_ids"][1, 0] = 19
    assert prefix.take_off(inputs, labels)[0] is inputs
    check(model, inputs, labels, layout=PaddedRows(prefix))
    check(model, *batch(seed=5), layout=PaddedRows(prefix))


def test_the_prefix_is_off_where_the_llm_trains_or_checkpoints(model):
    prefix = beginning(model)
    model.model.language_model.activation_checkpointing_enable()
    inputs, labels = batch()
    assert prefix.take_off(inputs, labels)[0] is inputs
    model.model.language_model.layers[0].requires_grad_(True)
    assert not beginning(model).possible


def test_cross_entropy_gives_pytorchs_gradients():
    torch.manual_seed(0)
    rows, weight, targets = torch.randn(50, 16, requires_grad=True), torch.randn(31, 16), torch.randint(0, 31, (50,))
    expected = functional.cross_entropy(rows @ weight.t(), targets, reduction="sum") * 3
    (gradient,) = torch.autograd.grad(expected, rows)
    for loss in (
        FrozenHeadLoss.apply(rows, weight, targets) * 3,
        LogitsLoss.apply(rows @ weight.t(), targets) * 3,
    ):
        (found,) = torch.autograd.grad(loss, rows)
        assert torch.allclose(loss, expected, rtol=1e-6)
        assert (found - gradient).norm() / gradient.norm() < 1e-6


def test_half_precision_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, targets = (torch.randn(400, 31) * 9).bfloat16(), torch.randint(0, 31, (400,))
    expected = functional.cross_entropy(logits.float(), targets, reduction="sum")
    assert torch.allclose(LogitsLoss.apply(logits.requires_grad_() * 1, targets), expected, rtol=1e-6)


@pytest.fixture
def focal():
    """Lin et al. 2017, gamma 2, as somebody would write a loss of their own."""

    @LOSSES.register("focal")
    @with_autograd
    def focal(logits, targets):
        log_probs = -functional.cross_entropy(logits, targets, reduction="none")
        return -((1 - log_probs.exp()) ** 2 * log_probs).sum()

    yield focal
    del LOSSES._entries["focal"]


def test_a_loss_is_a_function_and_a_registration(model, focal, monkeypatch):
    monkeypatch.setattr("train.loss.CHUNK_BYTES", 20 * 4 * 3)
    assert TrainSection.model_validate({"loss": "focal"}).loss == "focal"
    inputs, labels = batch()
    logits = model(**inputs, use_cache=False).logits[:, :-1][labels[:, 1:] != -100]
    targets = labels[:, 1:][labels[:, 1:] != -100]
    probs = logits.softmax(-1).gather(1, targets[:, None])
    expected = -((1 - probs) ** 2 * probs.log()).sum()
    gradient = torch.autograd.grad(expected, projector(model))
    for head_trains in (False, True):  # with the head in one, and from its logits
        model.lm_head.requires_grad_(head_trains)
        loss = summed_loss(model, model.lm_head, dict(inputs), labels, loss=LOSSES["focal"])
        assert abs(loss - expected) / expected < 1e-5
        for found, wanted in zip(torch.autograd.grad(loss, projector(model)), gradient, strict=True):
            assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_a_loss_that_does_not_exist_or_exists_twice(focal):
    with pytest.raises(ValueError, match="the loss 'focal' is registered twice"):
        LOSSES.register("focal")(focal)
    with pytest.raises(ValueError, match="there is no loss 'nope'; there are cross_entropy, focal"):
        TrainSection.model_validate({"loss": "nope"})
