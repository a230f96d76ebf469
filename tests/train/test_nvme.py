"""Parameters, and the optimizer with them, that live on a disk between their uses (ZeRO-Infinity): the curve of ZeRO-3, and an exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_resume import far, saving
from tests.train.workspace import Ranks, equal, losses, projector
from train.arguments import DEEPSPEED, TrainerSection, check_disk


def small(path: Path, stage: str) -> str:
    """The ready config with buffers, blocks, sub-groups and a threshold for a model of 80,048 parameters."""
    config = json.loads((DEEPSPEED / f"{stage}.json").read_text())
    config["zero_optimization"]["sub_group_size"] = 1000
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 500
    config["zero_optimization"]["offload_param"]["buffer_size"] = 20_000
    config["aio"]["block_size"] = 1024
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.launch
@pytest.mark.parametrize("ready", ["zero3_nvme", "zero3_nvme_optimizer"])
def test_the_same_curve_and_an_exact_resume(workspace: Path, ranks: Ranks, tmp_path: Path, ready: str) -> None:
    stage, disk = small(tmp_path / "nvme.json", ready), tmp_path / "disk"

    def run(name: str, **changes: Any) -> dict[str, Any]:
        return saving(workspace, tmp_path / name, stage, trainer__nvme_path=str(disk), **changes)

    resumed = run("resumed", trainer__resume=f"{tmp_path}/whole/checkpoint-2")
    ranks.run(run("whole"), resumed, saving(workspace, tmp_path / "memory", "zero3"), aio_stand_in=True)
    for rank in (0, 1):
        swapped = list(disk.glob(f"zero_stage_3/float32params/rank{rank}/*.swp"))
        assert len(swapped) > 20, "the model's matrices were on the disk"
        states = {path.name.split("-")[0] for path in disk.glob(f"zero_stage_3/optimizer/rank{rank}/*-*.swp")}
        assert states == ({"exp_avg", "exp_avg_sq"} if ready == "zero3_nvme_optimizer" else set())
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "memory"), rel=1e-5)
    assert far(projector(tmp_path / "memory"), projector(tmp_path / "whole")) < 1e-5
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[2:]
    assert equal(projector(tmp_path / "resumed"), projector(tmp_path / "whole"))


def test_the_folder_is_set_in_the_run_config() -> None:
    asked = TrainerSection(deepspeed="zero3_nvme", nvme_path="/disk").deepspeed_config()
    ready = TrainerSection(deepspeed="zero3_nvme").deepspeed_config()
    assert asked is not None
    assert ready is not None
    assert asked["zero_optimization"]["offload_param"]["nvme_path"] == "/disk"
    assert ready["zero_optimization"]["offload_param"]["nvme_path"] == "/local_nvme"


def test_without_libaio_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ValueError, match="needs libaio and its headers"):
        check_disk(TrainerSection(deepspeed="zero3_nvme").deepspeed_config())
    check_disk(TrainerSection(deepspeed="zero3_offload").deepspeed_config())
    check_disk(None)
