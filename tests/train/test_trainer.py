"""Half precision: what the trainer hands on to the model, and a float16 step whose gradient is infinite."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer

from tests.train.test_gradient import program
from train.ending import RunEnded
from train.trainer import ProjectorTrainer


def test_a_teacher_s_answers_stay_in_float32_under_deepspeed(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer casts whatever is floating-point to DeepSpeed's type; probabilities next to 1 would become 1."""
    _, trainer = program(workspace, tmp_path, monkeypatch)
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin)
    log_probs = torch.tensor([[-0.1234567, -3.7654321]])
    batch = {
        "pixel_values": torch.zeros(1, 3, 2, 2),
        "visual_tokens": [torch.zeros(2, 4)],
        "teacher_words": torch.tensor([[5, 6]]),
        "teacher_log_probs": log_probs,
    }
    found = trainer._prepare_inputs(batch)
    assert found["pixel_values"].dtype == found["visual_tokens"][0].dtype == torch.bfloat16
    assert found["teacher_words"].dtype == torch.int64
    assert torch.equal(found["teacher_log_probs"], log_probs)


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
