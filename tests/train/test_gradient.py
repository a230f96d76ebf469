"""The gradient that reaches the projector is the one of a plain forward over the whole batch, whatever is saved on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from data.dataset import build_dataset
from tests.train.workspace import config_of
from train.arguments import training_arguments
from train.build import build_model
from train.config import parse_config
from train.ending import StopRequest, Watchdog
from train.run import Hooks, build_run, build_trainer
from train.setup import Run, build_data
from train.trainable import free_parameters


def program(workspace: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Run, Any]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = parse_config(config_of(workspace, output, trainer__deepspeed="off", trainer__max_grad_norm=0.0, **changes))
    args = training_arguments(config.trainer, output_dir=str(output), seed=0, dtype="float32", world_size=1)
    made = build_run(config, args, StopRequest(), Watchdog(60, 0))
    return made, build_trainer(made, build_data(made), 0, Hooks(), None, None)


def plain_gradient(workspace: Path, output: Path, indices: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Each sample alone, all logits, transformers' own loss formula: mean over all supervised tokens."""
    config = parse_config(config_of(workspace, output))
    model, processor = build_model(config)
    free_parameters(model, config.train)
    dataset = build_dataset(config.data, processor, 0)
    collate, total, tokens = dataset.collator(), torch.zeros(()), 0
    for index in indices:
        batch = collate([dataset[index]])
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1].double()
        total = total + functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        tokens += int((labels[:, 1:] != -100).sum())
    (total / tokens).backward()
    return total.item() / tokens, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"data__batching": "packed"},
        {"data__batching": "length"},
        {"data__batching": "random", "train__share_prefix": False},
        {"trainer__per_device_train_batch_size": 8},
        {"trainer__per_device_train_batch_size": 1},
    ],
    ids=["packed", "length", "plain", "one batch", "eight accumulated"],
)
def test_one_step(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    made, trainer = program(workspace, tmp_path, monkeypatch, **changes)
    trainer.create_optimizer()
    model, _ = trainer.accelerator.prepare(trainer.plain, trainer.optimizer)
    trainer.model_wrapped = model
    loader = iter(trainer.get_train_dataloader())
    batches, supervised = trainer.get_batch_samples(loader, made.args.gradient_accumulation_steps, made.args.device)
    loss = sum(trainer.training_step(model, batch, supervised).item() for batch in batches)

    order = list(trainer.batches.order)[:8]
    expected, gradients = plain_gradient(workspace, tmp_path, order)
    assert loss == pytest.approx(expected, rel=1e-5)
    found = {name: p.grad for name, p in trainer.plain.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert len(found) == 4
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_a_batch_without_labels_is_no_nan(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trainer = program(workspace, tmp_path, monkeypatch)
    collate = trainer.data_collator
    batch = collate([])  # nothing but a blank image
    supervised = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    assert supervised.item() == 1
    loss = trainer.training_step(trainer.plain, batch, supervised)
    assert loss.item() == 0.0
    gradients = [p.grad for p in trainer.plain.parameters() if p.requires_grad]
    assert all(g is not None and bool(torch.isfinite(g).all()) and float(g.abs().max()) == 0.0 for g in gradients)
