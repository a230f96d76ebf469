"""A run that goes on where another stopped is the run that never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.workspace import Ranks, config_of, equal, losses, projector


def saving(workspace: Path, output: Path, stage: str = "zero2", **changes: Any) -> dict[str, Any]:
    """Saves in the middle of an epoch of three steps, and with the accumulation of two or four micro-batches."""
    changes = {"trainer__save_strategy": "steps", "trainer__save_steps": 2, "trainer__save_total_limit": 9, **changes}
    return config_of(workspace, output, trainer__deepspeed=stage, **changes)


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest distance between two tensors of a name, relative to their norm.

    Not weight by weight: Adam's first step divides a gradient by its own size, so where one is hardly more than rounding (on
    some CPUs a single weight of these) a run that adds up in another order moves that weight by another share of a step.
    """
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


@pytest.mark.launch
def test_bit_for_bit_with_the_same_processes_and_across_stages_within_rounding(
    workspace: Path, ranks: Ranks, tmp_path: Path
) -> None:
    stages = ("zero1", "zero2", "zero3", "zero2_offload", "off")
    whole = [saving(workspace, tmp_path / stage, stage) for stage in stages]
    same = [
        saving(
            workspace, tmp_path / f"{stage}_from_{step}", stage, trainer__resume=f"{tmp_path}/{stage}/checkpoint-{step}"
        )
        for stage in stages
        for step in (2, 4)
    ]
    across = [
        saving(workspace, tmp_path / f"{new}_after_{old}", new, trainer__resume=f"{tmp_path}/{old}/checkpoint-2")
        for old, new in (
            ("zero2", "zero3"),
            ("zero3", "zero1"),
            ("off", "zero2"),
            ("zero3", "off"),
            ("zero1", "zero2_offload"),
        )
    ]
    said = ranks.run(*whole, *same, *across)
    for stage in stages:
        expected = projector(tmp_path / stage)
        for step in (2, 4):
            assert equal(projector(tmp_path / f"{stage}_from_{step}"), expected), f"{stage} from {step}"
            assert losses(tmp_path / f"{stage}_from_{step}") == losses(tmp_path / stage)[step:]
    for config in across:
        output = Path(config["output_dir"])
        old = output.name.split("_after_")[1]
        assert far(projector(tmp_path / old), projector(output)) < 1e-5, output.name
        assert losses(output) == pytest.approx(losses(tmp_path / old)[2:], rel=1e-5)
    assert 'not bit for bit the interrupted run: zero was "zero2", is "zero3"' in said


@pytest.mark.launch
def test_another_number_of_processes(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(saving(workspace, tmp_path / "two"), saving(workspace, tmp_path / "two_z3", "zero3"))
    one = saving(workspace, tmp_path / "one", trainer__resume=f"{tmp_path}/two_z3/checkpoint-2")
    said = ranks.run(one, world=1)
    three = saving(
        workspace,
        tmp_path / "three",
        "zero3",
        trainer__resume=f"{tmp_path}/one/checkpoint-4",
        trainer__global_batch_size=6,
        trainer__per_device_train_batch_size=1,
    )
    also = ranks.run(three, world=3)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two")[2:], rel=1e-5)
    assert far(projector(tmp_path / "two"), projector(tmp_path / "one")) < 1e-5
    assert "world_size was 2, is 1" in said
    assert "global_batch was 8, is 6" in also
    assert len(losses(tmp_path / "three")) == 2


@pytest.mark.launch
def test_what_a_checkpoint_holds(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Three float32 tensors a trained parameter and what a few kilobytes can hold; none of the frozen weights."""
    ranks.run(saving(workspace, tmp_path / "run", trainer__save_total_limit=2))
    kept = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]
    size = {path.name: path.stat().st_size for path in (tmp_path / "run" / "checkpoint-6").iterdir()}
    assert 3936 * 3 * 4 < size["tensors-00000.safetensors"] < 3936 * 3 * 4 + 2000
    assert sum(size.values()) - size["tensors-00000.safetensors"] < 60_000
    assert not any(path.suffix in (".pt", ".pth", ".bin", ".pkl") for path in (tmp_path / "run").rglob("*"))


@pytest.mark.launch
def test_a_checkpoint_of_another_run_is_refused(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(saving(workspace, tmp_path / "run", trainer__max_steps=2))
    other_budget = saving(workspace, tmp_path / "run", zip__dominant=6)
    ranks.start(other_budget, world=1)
    assert ranks.wait() == [2]
    assert "belongs to another run (zip:" in ranks.output()
    assert "output_dir" in ranks.output()
    llm_too = saving(workspace, tmp_path / "run", train__parts=["projector", "llm"])
    ranks.start(llm_too, world=1)
    assert ranks.wait() == [2]
    assert "(trains:" in ranks.output()


@pytest.mark.launch
def test_a_finished_run_started_again_trains_no_further(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    config = saving(workspace, tmp_path / "run")
    ranks.run(config)
    before = projector(tmp_path / "run")
    said = ranks.run(config)
    assert "resuming from" in said
    assert "step 6 of 6" in said
    assert equal(before, projector(tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 6
    assert "max_steps=3 is behind it" in ranks.run({**config, "trainer": {**config["trainer"], "max_steps": 3}})


@pytest.mark.launch
def test_rejected_records_are_listed_once_over_a_resume(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    rows = json.loads((workspace / "train.json").read_text())
    rows[1]["image"] = rows[2]["image"] = "gone.png"
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    source = [{"path": str(tmp_path / "bad.json"), "images": str(workspace / "images")}]
    config = saving(workspace, tmp_path / "run", data__sources=source, data__max_rejected=0.2)
    ranks.run(config)
    resumed = {**config, "trainer": {**config["trainer"], "max_steps": 8}}
    ranks.run(resumed)
    listed = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in listed) == ["r1", "r2"]
    assert {row["reason"] for row in listed} == {"file missing"}
    strict = config_of(workspace, tmp_path / "early", data__sources=source, data__max_rejected=0.05)
    ranks.start(strict)
    assert 65 in ranks.wait()
    assert "2 bad records among the first 24 read; data.max_rejected=0.05 allows 1 of 24" in ranks.output()
    assert not (tmp_path / "early" / "metrics.jsonl").exists(), (
        "nothing was computed: files that are missing show at once"
    )
    shutil.copytree(workspace / "images", tmp_path / "images")
    (tmp_path / "images" / "damaged.png").write_bytes(b"only decoding shows what this is")
    rows[1]["image"] = rows[2]["image"] = "damaged.png"
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    source[0]["images"] = str(tmp_path / "images")
    strict = config_of(workspace, tmp_path / "strict", data__sources=source, data__max_rejected=0.05)
    ranks.start(strict)
    assert 65 in ranks.wait()
    # Seed 0 reads r2 in the first of an epoch's three steps and r1 in the last: the second bad record is one too many.
    assert "2 bad records among the first 24 read; data.max_rejected=0.05 allows 1 of 24" in ranks.output()
    assert len(losses(tmp_path / "strict")) == 2
