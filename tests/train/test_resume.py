"""A run that goes on where another stopped is the run that never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.train.workspace import Ranks, config_of, equal, losses, projector
from train.callbacks import read_metrics


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


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """File → time of change and bytes."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.launch
def test_from_the_last_checkpoint_nothing_is_trained(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Four steps end within an epoch of three; the constant rate would show one step more."""
    output = tmp_path / "run"
    config = saving(workspace, output, trainer__max_steps=4, trainer__lr_scheduler_type="constant")
    ranks.run(config)
    expected, metrics = projector(output), (output / "metrics.jsonl").read_bytes()
    shutil.rmtree(output / "projector")
    saved = contents(output / "checkpoint-4")
    said = ranks.run(config)
    assert "it is the last step: nothing is trained, its weights are exported" in said
    assert equal(projector(output), expected)
    assert (output / "metrics.jsonl").read_bytes() == metrics
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert contents(output / "checkpoint-4") == saved
    before = contents(output)
    said = ranks.run(config)
    assert "(step 4 of 4): this run is finished, nothing is trained or written" in said
    assert contents(output) == before
    file = output / "projector" / "projector.safetensors"
    for damaged in (b"", file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])):
        file.write_bytes(damaged)
        ranks.run(config)
        assert equal(projector(output), expected), "an export that is not complete, or was changed, is made again"
    changed = {
        **config,
        "eval": {"sources": [{"path": str(workspace / "heldout.json"), "images": str(workspace / "images")}]},
    }
    assert "training_free" in json.loads(_evaluated(ranks, changed))["scores"], (
        "another config is not what was finished"
    )
    assert equal(projector(output), expected)


def _evaluated(ranks: Ranks, config: dict[str, Any]) -> str:
    ranks.run(config)
    return (Path(config["output_dir"]) / "base_scores.json").read_text()


SETTINGS = {
    "trainer__learning_rate": (2e-2, "trainer.learning_rate was 0.01, is 0.02"),
    "trainer__lr_scheduler_type": ("constant", 'trainer.lr_scheduler_type was "cosine", is "constant"'),
    "trainer__warmup_steps": (2, "trainer.warmup_steps was 0, is 2"),
    "trainer__weight_decay": (0.1, "trainer.weight_decay was 0.0, is 0.1"),
    "trainer__max_grad_norm": (0.5, "trainer.max_grad_norm was 1.0, is 0.5"),
    "trainer__adam_beta2": (0.95, "trainer.adam_beta2 was 0.999, is 0.95"),
    "train__lora": ({"on": ["llm"], "alpha": 8}, "train.lora.alpha was 32, is 8"),
}


@pytest.mark.launch
def test_settings_that_can_not_change_are_refused_with_both_values(
    workspace: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """They were ignored, or took effect unsaid, and `config.yaml` recorded them."""
    output = tmp_path / "run"
    base = {"trainer__max_steps": 4, "train__lora": {"on": ["llm"], "alpha": 32}}
    ranks.run(saving(workspace, output, **base), world=1)
    before = contents(output)
    for key, (value, says) in SETTINGS.items():
        ranks.start(saving(workspace, output, **{**base, "trainer__max_steps": 6, key: value}), world=1)
        assert ranks.wait() == [2], key
        said = ranks.output()
        assert (
            f"checkpoint-4 was trained with other settings, which can't change on resume: {says}. Set them back" in said
        )
        assert contents(output) == before, "neither config.yaml nor anything else"


@pytest.mark.launch
def test_a_longer_run_follows_the_schedule_of_its_new_length(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    linear = {"trainer__lr_scheduler_type": "linear"}
    longer = saving(workspace, tmp_path / "run", trainer__max_steps=8, **linear)
    ranks.run(saving(workspace, tmp_path / "run", trainer__max_steps=4, **linear))
    said = ranks.run(longer, saving(workspace, tmp_path / "whole", trainer__max_steps=8, **linear))
    assert "max_steps was 4, is 8: the learning rate now follows a schedule of 8 steps" in said
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    whole = [line["learning_rate"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in line]
    assert rates[4:] == whole[4:], "from the first step on"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_steps"] == 8


@pytest.mark.launch
def test_what_takes_effect_is_named(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Other records behind the same path in the same number, another length, another seed."""
    rows = json.loads((workspace / "train.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    source = [{"path": str(tmp_path / "mine.json"), "images": str(workspace / "images")}]
    config = saving(workspace, tmp_path / "run", data__sources=source, trainer__max_steps=2)
    ranks.run(config, world=1)
    rows[0]["conversations"][1]["value"] = "another answer"
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    config["data"]["max_length"] = 100
    said = ranks.run({**config, "seed": 3, "trainer": {**config["trainer"], "max_steps": 4}}, world=1)
    for line in ("content.mine was", "data.max_length was 128, is 100", "seed was 0, is 3"):
        assert f"not bit for bit the interrupted run: {line}" in said


@pytest.mark.launch
def test_a_run_that_starts_anew_leaves_no_checkpoint_of_the_one_before(
    workspace: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """They pushed its own ones out, being later, and the next start went on from them."""
    config = saving(workspace, tmp_path / "run", trainer__save_total_limit=2)
    ranks.run(config)
    anew = {**config, "seed": 5, "trainer": {**config["trainer"], "resume": None, "max_steps": 2}}
    said = ranks.run(anew)
    assert "checkpoint-4, checkpoint-6 in" in said
    assert "will be deleted when this run saves its first checkpoint" in said
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


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
