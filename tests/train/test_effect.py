"""The claim of the whole, small enough for a test: compression costs accuracy, fine-tuning the projector wins much of it back.

`make demo` is the same with ten times the steps and five times the questions, which wins back most of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data import shapes
from data.config_file import read_config_file
from tests.train.workspace import ROOT, Ranks


@pytest.mark.launch
def test_fine_tuning_wins_back_what_compression_lost(ranks: Ranks, tmp_path: Path) -> None:
    shapes.write(tmp_path / "data", train=1000, held_out=80, seed=0)
    config = read_config_file(ROOT / "configs" / "tiny-llava" / "demo.yaml")
    config["output_dir"] = str(tmp_path / "run")
    config["model"]["path"] = str(ROOT / "data" / "tiny-llava")
    for section, name in (("data", "train"), ("eval", "eval")):
        config[section]["sources"] = [
            {"path": str(tmp_path / "data" / f"{name}.json"), "images": str(tmp_path / "data" / "images")}
        ]
    config["trainer"] |= {
        "max_steps": 60, "per_device_train_batch_size": 16, "global_batch_size": 32, "save_strategy": "no",
    }  # fmt: skip
    config |= {"wandb": {"enabled": False}, "report": {"images": 0}}
    ranks.run(config)
    found = json.loads((tmp_path / "run" / "report" / "results.json").read_text())
    assert (found["tokens"], found["of_tokens"], found["questions"]) == (16, 81, 400)
    assert found["full"] >= 0.95
    lost = found["full"] - found["training_free"]
    assert lost > 0.1
    assert found["fine_tuned"] - found["training_free"] >= 0.35 * lost
