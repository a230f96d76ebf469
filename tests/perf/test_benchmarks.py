"""The benchmark commands: every figure in one object, the ways equal, and no GPU means one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import benchmark, gpu_check
from scripts.benchmarks import exactness, train
from scripts.benchmarks.presets import PRESETS

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def figures(capsys, *arguments: str) -> dict:
    assert benchmark.main([*arguments, "--rounds", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_train(capsys):
    found = figures(capsys, "train", "--preset", "tiny")
    assert set(found["ways"]) == {"plain", "fast", "fast + cache"}
    for way in found["ways"].values():
        assert way["loss_difference"] < 1e-5
        assert way["gradient_difference"] < 1e-5
    plain, fast = found["ways"]["plain"], found["ways"]["fast + cache"]
    assert plain["work"]["supervised"] == fast["work"]["supervised"]
    assert fast["work"]["padded"] == fast["work"]["tokens"] < plain["work"]["tokens"] < plain["work"]["padded"]
    assert fast["model_flop_utilisation"] == pytest.approx(
        fast["samples_per_second"] / fast["bound_samples_per_second"]
    )


def test_the_work_that_is_counted_is_the_work_that_is_done():
    torch.manual_seed(0)
    bench = train.Bench(PRESETS["tiny"], torch.device("cpu"))
    bench.step(train.WAYS["fast"])  # computes the prefix, once for all steps
    through: list[int] = []
    llm = bench.model.model.language_model
    llm.layers[0].mlp.gate_proj.register_forward_hook(lambda module, args, out: through.append(out.shape[:-1].numel()))
    ways = {**train.WAYS, **train.FULL, **{name: train.PARTS[name] for name in ("padded, sorted", "no shared prefix")}}
    for name, way in ways.items():
        through.clear()
        bench.step(way)
        work = bench.work(way)
        again = 2 if way.checkpointing else 1
        assert sum(through) == again * work.padded, name
        assert work.tokens <= work.padded, name


def test_encoder_cache_and_prefill(capsys):
    found = figures(capsys, "encoder", "--encoder", "tiny")
    assert found["ours_over_plain"] == pytest.approx(found["seconds"]["ours"] / found["seconds"]["plain"])
    assert set(found["share_of_encoder"]) == {"visionzip"}
    found = figures(capsys, "cache", "--preset", "tiny", "--entries", "50", "--workers", "1")
    assert found["entries"] == 50
    assert found["reads"][0]["entries_per_second"] > 0
    found = figures(capsys, "prefill", "--preset", "tiny")
    assert found["ways"]["compressed"]["kv_cache_bytes"] < found["ways"]["full"]["kv_cache_bytes"]


def test_golden_cases_and_gradients_as_the_gpu_check_runs_them():
    golden = exactness.golden(torch.device("cpu"))
    assert golden["passed"]
    assert len(golden["rows"]) == 3
    gradients = exactness.gradients(torch.device("cpu"), [torch.float32])
    assert gradients["passed"], gradients["rows"]


@without_gpu
def test_without_a_gpu_one_line(capsys):
    assert benchmark.main(["train", "--preset", "llava-1.5-7b"]) == 2
    assert gpu_check.main([]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all("needs" in line and "GPU" in line for line in lines)


def test_the_gpu_check_needs_only_what_the_library_needs():
    code = (
        "import sys, scripts.gpu_check, train.packing, train.prefix; "
        "print(sorted({'deepspeed', 'datasets', 'wandb', 'omegaconf'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip().splitlines()[-1] == "[]"


def test_the_gpu_check_ends_in_its_table_whatever_failed():
    """A part that was not run, and one of whose ways only the plain one fitted into memory."""
    rows = gpu_check.judged({"train-7b": {"ways": {"plain": {"samples_per_second": 1.0}}}})
    assert len(rows) == len(gpu_check.TARGETS)
    assert {row[2] for row in rows} == {"not run"}
