"""What a GPU trains in: frozen weights in bfloat16, DeepSpeed's bfloat16 optimizers or autocast over float32 masters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.test_resume import saving
from tests.train.workspace import equal, launch, losses, projector

STAGES = ("off", "zero1", "zero3")  # autocast and DDP; DeepSpeed's BF16_Optimizer; the stages above 1


@pytest.mark.launch
def test_bfloat16_learns_as_float32_does_and_resumes_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    configs = [
        saving(workspace, tmp_path / f"{stage}{suffix}", stage, model__dtype="bfloat16", trainer__resume=resume)
        for stage in STAGES
        for suffix, resume in (("", None), ("_again", f"{tmp_path}/{stage}/checkpoint-2"))
    ]
    exact = saving(workspace, tmp_path / "float32", "off")
    # Some CPUs have bfloat16 matrix units that oneDNN crashes on; it has to be told before torch starts.
    launch([exact, *configs], ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
    for stage in STAGES:
        assert losses(tmp_path / stage) == pytest.approx(losses(tmp_path / "float32"), rel=0.02), stage
        assert losses(tmp_path / f"{stage}_again") == losses(tmp_path / stage)[2:], stage
        assert equal(projector(tmp_path / stage), projector(tmp_path / f"{stage}_again")), stage
    assert {value.dtype for value in projector(tmp_path / "off").values()} == {torch.float32}
    assert {value.dtype for value in projector(tmp_path / "zero1").values()} == {torch.bfloat16}
