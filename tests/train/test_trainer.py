"""Half precision: what the trainer hands on to the model, and a float16 step whose gradient is infinite."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from train.ending import RunEnded
from train.trainer import ProjectorTrainer


@pytest.mark.parametrize(
    ("float16", "scaler", "skipped", "ends"),
    [
        (False, None, False, True),
        (False, None, True, True),  # left out by DeepSpeed, as would be all that follow
        (True, 65536.0, False, False),  # torch's scaler will leave the step out
        (True, None, True, False),  # DeepSpeed has left it out, and will try a smaller scale
        (True, 0.5, False, True),  # no scale is small enough
    ],
)
def test_an_infinite_gradient(
    float16: bool, scaler: float | None, skipped: bool, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda self, model, grad_norm: grad_norm)
    trainer: Any = object.__new__(ProjectorTrainer)
    trainer.state, trainer.args = SimpleNamespace(global_step=0), SimpleNamespace(fp16=float16)
    scale = SimpleNamespace(get_scale=lambda: scaler) if scaler else None
    trainer.accelerator = SimpleNamespace(scaler=scale, optimizer_step_was_skipped=skipped)
    if ends:
        with pytest.raises(RunEnded, match="the gradient is inf at step 1"):
            trainer._get_grad_norm(None, torch.tensor(math.inf))
    else:
        assert trainer._get_grad_norm(None, torch.tensor(math.inf)) == math.inf
    assert trainer._get_grad_norm(None, torch.tensor(2.0)) == 2.0
