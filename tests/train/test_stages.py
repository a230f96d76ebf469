"""What must not matter does not: ZeRO stage, offload, number of processes, accumulation, launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.workspace import Ranks, config_of, equal, launch, losses, projector

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "off")


@pytest.fixture(scope="module")
def reference(workspace: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """One process, no DeepSpeed, one sample at a time, nothing shared between samples: the plainest way there is."""
    config = config_of(
        workspace,
        tmp_path_factory.mktemp("reference") / "run",
        trainer__deepspeed="off",
        trainer__per_device_train_batch_size=1,
        data__batching="random",
        train__share_prefix=False,
    )
    ranks.run(config, world=1)
    return losses(Path(config["output_dir"]))


def runs(workspace: Path, folder: Path, named: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: config_of(workspace, folder / name, **changes) for name, changes in named.items()}


@pytest.mark.launch
def test_every_stage_gives_the_same_curve(
    workspace: Path, ranks: Ranks, tmp_path: Path, reference: list[float]
) -> None:
    configs = runs(workspace, tmp_path, {stage: {"trainer__deepspeed": stage} for stage in STAGES})
    ranks.run(*configs.values())
    assert reference[-1] < reference[0]
    for config in configs.values():
        assert losses(Path(config["output_dir"])) == pytest.approx(reference, rel=1e-4), config["trainer"]["deepspeed"]


@pytest.mark.launch
def test_micro_batch_and_order_within_a_step_do_not_matter(
    workspace: Path, ranks: Ranks, tmp_path: Path, reference: list[float]
) -> None:
    named = {
        "one_at_a_time": {"trainer__per_device_train_batch_size": 1},
        "all_at_once": {"trainer__per_device_train_batch_size": 4},
        "random_batches": {"data__batching": "random"},
        "no_prefix": {"train__share_prefix": False},
        "compiled": {"trainer__torch_compile": True, "trainer__torch_compile_backend": "aot_eager"},
    }
    configs = runs(workspace, tmp_path, named)
    ranks.run(*configs.values())
    for name, config in configs.items():
        assert losses(Path(config["output_dir"])) == pytest.approx(reference, rel=1e-4), name


@pytest.mark.launch
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "python"])
def test_every_launcher_runs_the_same_command(
    workspace: Path, tmp_path: Path, reference: list[float], launcher: str
) -> None:
    config = config_of(workspace, tmp_path / "run")
    done = launch(config, launcher, 1 if launcher == "python" else 2)
    assert losses(tmp_path / "run") == pytest.approx(reference, rel=1e-4)
    said = done.stdout + done.stderr
    assert said.count("training 3,936 of 80,048 parameters (projector)") == 1
    assert said.count("100%|") == 1, "one bar, however many processes"
    assert "samples/s" in said
    assert "loss" in said
    assert ("2 processes x 2 samples x 2" if launcher != "python" else "1 process x 2 samples x 4") in said


@pytest.mark.launch
def test_nothing_but_the_projector_changes(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Every frozen tensor of a ZeRO-3 run, gathered at its end, is bit for bit the base model's."""
    from transformers import AutoModelForImageTextToText

    config = config_of(workspace, tmp_path / "run", trainer__deepspeed="zero3", train__parts=["projector"])
    whole = config_of(workspace, tmp_path / "llm", train__parts=["llm"], trainer__max_steps=1)
    ranks.run(config, whole)
    base = AutoModelForImageTextToText.from_pretrained(workspace / "model").state_dict()
    trained = projector(tmp_path / "run")
    assert len(trained) == 4
    assert not any(torch.equal(value, base[name]) for name, value in trained.items())
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "llm" / "model").state_dict()
    changed = {name for name in base if not torch.equal(base[name], after[name])}
    assert changed
    assert all(name.startswith(("model.language_model", "lm_head")) for name in changed)


@pytest.mark.launch
def test_a_rank_whose_batches_have_no_images(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Four records: one with an image, so that in each step at least one rank has none."""
    import json

    rows = json.loads((workspace / "train.json").read_text())
    few = [*[row for row in rows if "image" not in row][:3], next(row for row in rows if "image" in row)]
    (tmp_path / "few.json").write_text(json.dumps(few))
    source = [{"path": str(tmp_path / "few.json"), "images": str(workspace / "images")}]
    configs = runs(
        workspace,
        tmp_path,
        {
            stage: {
                "trainer__deepspeed": stage,
                "data__sources": source,
                "trainer__global_batch_size": 2,
                "trainer__per_device_train_batch_size": 1,
                "trainer__max_steps": 4,
            }
            for stage in ("zero2", "zero3")
        },
    )
    ranks.run(*configs.values())
    assert len(losses(tmp_path / "zero2")) == 4
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "zero2"), rel=1e-5)


@pytest.mark.launch
def test_the_same_command_twice_gives_the_same_bits(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    configs = runs(workspace, tmp_path, {"a": {}, "b": {}, "other": {"seed": 1}})
    ranks.run(*configs.values())
    assert equal(projector(tmp_path / "a"), projector(tmp_path / "b"))
    assert not equal(projector(tmp_path / "a"), projector(tmp_path / "other"))
