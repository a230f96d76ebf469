"""The time that `visionzip plan --tflops measure` predicts, against a short run here: seconds per step from pixels and from a token cache.

The rate is that of one layer of the LLM (`train.duration.measure_rate`); the run is `train.run`, as `train.py` starts it.
"""

from __future__ import annotations

from typing import Any

from scripts.benchmarks import measure
from scripts.benchmarks.peer_data import our_config
from scripts.benchmarks.peers import Setting, run_ours
from train.config import RunConfig
from train.duration import measure_rate, sample_work
from train.memory import measure_model, model_without_weights


def run(setting: Setting) -> dict[str, Any]:
    setting.make()
    preset = setting.shapes
    budget = {"dominant": preset.dominant, "contextual": preset.contextual}
    rows = {}
    for label, cache in (("from pixels", None), ("from the token cache", setting.work / "tokens")):
        out = setting.work / "runs" / label.replace(" ", "-")
        values = our_config(preset, setting.model, setting.records, out, setting.steps, budget, cache)
        found = run_ours(setting.python, values, {"out": str(out), "threads": setting.threads})
        config = RunConfig.model_validate(values)
        model = model_without_weights(config, setting.work)
        length = round(found["tokens_per_step"] / preset.batch)
        rate = measure_rate(model, config, preset.batch, length)
        predicted = preset.batch * sample_work(model, config, measure_model(model, config), length).total / rate
        rows[label] = {
            "measured": found["seconds"], "predicted": predicted, "off": predicted / found["seconds"] - 1, "tflops": rate / 1e12,
            "tokens_per_sample": length,
        }  # fmt: skip
    return {"preset": setting.preset, "steps": setting.steps, "batch": preset.batch, "rows": rows}


def show(result: dict[str, Any]) -> str:
    lines = [
        [label, str(row["tokens_per_sample"]), f"{row['tflops']:.3f}", f"{row['predicted']:.2f}", f"{row['measured']:.2f}",
         f"{100 * row['off']:+.0f} %"]
        for label, row in result["rows"].items()
    ]  # fmt: skip
    headers = ["", "LLM tokens per sample", "TFLOP/s of a layer", "predicted s per step", "measured", "off by"]
    title = f"{result['preset']}: {result['batch']} samples per step, median of {result['steps'] - 1} steps"
    return f"{title}\n\n{measure.table(headers, lines)}"
