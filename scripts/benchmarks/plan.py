"""`train.plan`'s time against a short run here: predicted and measured seconds per step, from pixels and from a token cache.

The rate is measured on one layer of the LLM (`train.duration.measure_rate`), the work counted for the tokens that go through the
LLM; the run is `train.run`, as `train.py` starts it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.benchmarks import measure, peers
from scripts.benchmarks.presets import PRESETS
from train.config import load_config
from train.duration import measure_rate, sample_work
from train.memory import measure_model, model_without_weights


def run(name: str, cache: Path, steps: int, threads: int | None) -> dict[str, Any]:
    preset = PRESETS[name]
    work = cache / "work" / f"plan-{name}"
    shutil.rmtree(work, ignore_errors=True)
    peers.make_model(preset, work / "model")
    records = work / "records"
    peers.make_records(records, preset.batch * steps, preset.text["vocab_size"], preset.vision["image_size"])
    budget = {"dominant": preset.dominant, "contextual": preset.contextual}
    rows = {}
    for label, tokens in (("from pixels", None), ("from the token cache", work / "tokens")):
        out = work / "runs" / label.replace(" ", "-")
        path = peers.our_config(preset, work, records, out, steps, budget, tokens)
        if tokens is not None:
            command = [sys.executable, "-m", "data.cache", "--config", str(path), "--workers", "0"]
            subprocess.run(command, cwd=peers.ROOT, check=True, capture_output=True)
        spec = {"out": str(out), "config": str(path), "threads": threads}
        found = peers.measured("ours", Path(sys.executable), spec, out.parent / f"{out.name}.log")
        config = load_config(path)
        model = model_without_weights(config, work)
        sizes = measure_model(model, config)
        length = found["tokens_per_step"] / preset.batch
        rate = measure_rate(model, config, preset.batch, round(length))
        predicted = preset.batch * sample_work(model, config, sizes, length).total / rate
        rows[label] = {
            "measured": found["seconds"], "predicted": predicted, "off": predicted / found["seconds"] - 1, "tflops": rate / 1e12,
            "tokens_per_sample": length,
        }  # fmt: skip
    return {"preset": name, "steps": steps, "batch": preset.batch, "rows": rows, "load": os.getloadavg()[0]}


def show(result: dict[str, Any]) -> str:
    lines = [
        [label, f"{row['tokens_per_sample']:.0f}", f"{row['tflops']:.3f}", f"{row['predicted']:.2f}", f"{row['measured']:.2f}",
         f"{100 * row['off']:+.0f} %"]
        for label, row in result["rows"].items()
    ]  # fmt: skip
    headers = [
        "",
        "tokens through the LLM per sample",
        "TFLOP/s of a layer",
        "predicted s per step",
        "measured",
        "off by",
    ]
    title = f"{result['preset']}: {result['batch']} samples per step, median of {result['steps'] - 1} steps"
    return f"{title}\n\n{measure.table(headers, lines)}"
