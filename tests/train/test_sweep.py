"""A sweep: the cells it plans, cells from the cache equal to a run of their own, what a second start does, the tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_llava, tiny_processor
from tests.train.workspace import ROOT, Ranks, config_of, environment, write_config
from train.commands import start
from train.config import ConfigError
from train.sweep_cells import make_cells, parse_axes, preset_axes, split_budget
from train.sweep_costs import costs_of
from train.sweep_results import Group, compare_groups, rank_agreement, render_markdown
from train.tasks import visible_gpu
from visionzip import ZipConfig, attach


@pytest.fixture
def config(workspace: Path, tmp_path: Path) -> Path:
    held_out = {
        "sources": [{"path": str(workspace / "heldout.json"), "images": str(workspace / "images")}],
        "batch_size": 4,
        "max_new_tokens": 4,
    }
    return write_config(
        config_of(
            workspace, tmp_path / "run", eval=held_out, report={"images": 0}, trainer__deepspeed="off",
            trainer__max_steps=3,
        )
    )  # fmt: skip


def test_axes_and_overrides_are_told_apart() -> None:
    axes, overrides = parse_axes(
        ["selector=a", "budget=8,13+3", "trainer.learning_rate=1e-3,3e-3", "eval.compare=[full,x]"]
    )
    assert axes == {"selector": ["a"], "budget": ["8", "13+3"], "trainer.learning_rate": ["1e-3", "3e-3"]}
    assert overrides == ["eval.compare=[full,x]"]
    for wrong in (["selector"], ["seed=0", "seed=1"]):
        with pytest.raises(ConfigError):
            parse_axes(wrong)


def test_a_budget_is_split_as_the_config_does_where_it_is_its_total_else_as_in_the_paper() -> None:
    config = ZipConfig(dominant=12, contextual=4)
    assert split_budget("16", config) == (12, 4)
    assert split_budget("64", config) == (54, 10)
    assert split_budget("128", config) == (108, 20)
    assert split_budget("13+3", config) == (13, 3)
    assert split_budget("1", config) == (1, 0)
    for wrong in ("0", "8.5", "x", "13+", "all"):
        with pytest.raises(ConfigError):
            split_budget(wrong, config)


def test_a_cache_that_the_config_names_is_of_one_budget_and_not_read(config: Path, tmp_path: Path) -> None:
    given = ["budget=5+2,4", "data.cache=elsewhere"]
    cells = make_cells(str(config), tmp_path / "out", given)
    caches = {cell.config.data.cache for cell in cells}
    assert len(caches) == 2
    assert "elsewhere" not in caches
    assert all(cell.config.eval.cache == cell.config.data.cache for cell in cells)
    for cell in make_cells(str(config), tmp_path / "out", given, cached=False):
        assert cell.config.data.cache is cell.config.eval.cache is None


def test_full_tokens_are_measured_once_and_training_free_ones_once_a_selector_and_budget(
    config: Path, tmp_path: Path
) -> None:
    given = ["selector=visionzip,random", "budget=5+2,4", "trainer.learning_rate=1e-3,1e-2", "seed=0,1"]
    cells = make_cells(str(config), tmp_path / "out", given)
    assert len(cells) == 16
    assert len({cell.folder for cell in cells}) == 16
    assert len({cell.config.data.cache for cell in cells}) == len({cell.free for cell in cells}) == 4
    measured = [
        (cell.axes["selector"], cell.axes["budget"], what) for cell in cells for what in cell.config.eval.compare
    ]
    assert sorted(measured) == sorted(
        [(s, b, "training_free") for s in ("visionzip", "random") for b in ("5+2", "4")]
        + [("visionzip", "5+2", "full")]
    )
    other = make_cells(str(config), tmp_path / "out", [*given, "trainer.max_steps=4"])
    assert not {cell.folder for cell in cells} & {cell.folder for cell in other}


@pytest.mark.launch
def test_cells_are_runs_of_the_program_and_a_second_start_runs_what_is_missing(
    config: Path, ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "train.sweep", "--config", str(config), "--out", str(out), "selector=visionzip,random",
               "budget=5+2", "seed=1"]  # fmt: skip
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while not list(out.glob("cells/*/report/results.json")):
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/report/results.json")}
    assert len(before) == 1

    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    found = json.loads((out / "sweep.json").read_text())
    assert len(found["cells"]) == 2
    assert [group["seeds"] for group in found["groups"]] == [1, 1]
    assert all(group["training_free"] is not None for group in found["groups"])
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| 7 | random |" in done.stdout

    folder = next(out.glob("cells/random-5+2-s1-*"))
    alone = load(folder / "config.yaml")
    alone["output_dir"] = str(tmp_path / "alone")
    alone["data"]["cache"] = alone["eval"]["cache"] = None
    ranks.run(alone, world=1)
    assert tuned(tmp_path / "alone") == tuned(folder)

    assert start("sweep", [*command[3:], "--jobs", "2"]) == 0  # nothing is left to do
    assert "2 cells, 2 finished before" in capsys.readouterr().err


def load(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


def tuned(folder: Path) -> list[str]:
    rows = map(json.loads, (folder / "report" / "answers.jsonl").read_text().splitlines())
    return [row["answer"] for row in rows if row["model"] == "fine_tuned"]


def group(free: float, right: list[list[float]], selector: str = "x") -> Group:
    import numpy as np

    seeds = [float(np.mean(seed)) for seed in right]
    return Group({"selector": selector, "budget": "8"}, 8, len(right), free, float(np.mean(seeds)), float(np.std(seeds, ddof=1)),
                 right=np.mean(right, axis=0), images=np.array([0, 0, 1, 1]))  # fmt: skip


def test_the_error_of_a_difference_is_over_images_and_seeds() -> None:
    best, other = group(0.5, [[1, 1, 1, 1], [1, 1, 1, 0]], "a"), group(0.6, [[1, 0, 0, 0], [1, 0, 0, 0]], "b")
    gap, error = compare_groups(best, other)
    # by image: (0 + 1) and (1 + 0.5) of four questions; seeds of `best`: 1 and 0.75
    images = 2 * ((1 - 1.25) ** 2 + (1.5 - 1.25) ** 2) / 16
    seeds = ((1 - 0.875) ** 2 + (0.75 - 0.875) ** 2) / 2
    assert gap == pytest.approx(2.5 / 4)
    assert error == pytest.approx((images + seeds) ** 0.5)
    best.behind, (other.behind, other.behind_error) = None, (gap, error)
    text = render_markdown([best, other], 0.9, 81, 4)
    assert "| 8 | a | 50.0 | **87.5 ± 17.7** | 2 | +37.5 |  |" in text
    assert "| 8 | b | 60.0 | 25.0 ± 0.0 | 2 | -35.0 | 62.5 ± 17.7 |" in text
    assert "one seed" not in text
    other.seeds = 1
    assert "one seed" in render_markdown([best, other], 0.9, 81, 4)


@pytest.mark.parametrize(
    ("gpu", "visible", "expected"),
    [(0, None, "0"), (2, None, "2"), (1, "4,6", "6"), (0, "GPU-ab, GPU-cd", "GPU-ab")],
)
def test_a_cell_sees_one_gpu_of_those_that_the_sweep_sees(gpu: int, visible: str | None, expected: str) -> None:
    assert visible_gpu(gpu, visible) == expected


def test_rank_agreement() -> None:
    same = [group(free, [[free] * 4] * 2) for free in (0.1, 0.2, 0.3)]
    assert rank_agreement(same) == [(8, 1.0)]
    same[0].fine_tuned = 0.9
    assert rank_agreement(same) == [(8, pytest.approx(-1 / 3))]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "nothing to compare: give selector="),
        (["trainer.max_steps=4"], "nothing to compare: give selector="),
        (["selector=nope"], "selector=nope: no selector is called 'nope'; known: "),
    ],
)
def test_what_can_not_be_compared_is_said_before_anything_runs(
    given: list[str], says: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("sweep", ["--config", str(config), "--out", str(tmp_path / "out"), *given]) == 2
    assert capsys.readouterr().err.startswith(f"config error: {says}")
    assert not (tmp_path / "out").exists()


@pytest.mark.launch
def test_a_sweep_whose_cells_all_fail_logs_no_summary(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.sweep", "--config", str(config), "--out", str(tmp_path / "out"), "budget=8",
               "zip.layer=99", "wandb.enabled=true"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "no cell finished: there is nothing to compare"
    assert "W&B" not in done.stderr


def test_a_row_says_what_a_prompt_costs_and_whether_scaling_down_is_beaten() -> None:
    scaled, better = group(0.5, [[1, 0, 0, 0]] * 2, "scaled"), group(0.5, [[1, 1, 1, 1]] * 2, "a")
    same = group(0.5, [[1, 0, 1, 0], [0, 1, 0, 0]], "b")
    same.beats_scaled, better.beats_scaled = False, True
    better.costs = {
        "visual_tokens": 8,
        "visual_tokens_mean": 6.5,
        "flops": 2.5e9,
        "encode_flops": 1e9,
        "cache_bytes": 4096,
    }
    text = render_markdown([better, scaled, same], 0.9, 81, 4)
    row = next(line for line in text.splitlines() if line.startswith("| 8 | a |"))
    assert row.endswith("| 6.5 | 2.5 | 4.096 |")
    assert "†" not in row
    assert "37.5 ± 17.7** † |" in text
    assert "†: not better than the image scaled down" in text


def test_costs_are_counted_on_the_model_itself() -> None:
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, dominant=5, contextual=2)
    few = costs_of(model, processor)
    attach(model, processor, dominant=10, contextual=4)
    more = costs_of(model, processor)
    head = 48 // 4
    assert (few["visual_tokens"], few["visual_tokens_mean"]) == (7, 7)
    assert few["cache_bytes"] == pytest.approx(
        7 * 2 * 2 * 2 * head * 4
    )  # keys and values of 2 layers with 2 heads in float32
    assert few["encode_flops"] < more["encode_flops"] < more["flops"]
    attach(model, processor, dominant=7, contextual=2, selector="scaled")
    assert costs_of(model, processor)["encode_flops"] < few["encode_flops"]


def test_a_preset_names_axes_and_what_is_given_replaces_them() -> None:
    found = dict(item.split("=") for item in preset_axes("selectors", ["seed=7", "budget=8"]))
    assert {"scaled", "pooled", "visionzip", "mmtok"} <= set(found["selector"].split(","))
    assert "seed" not in found
    assert preset_axes(None, []) == []
