"""The trainers that people use, beside ours: same model directory, same records in each one's format, same samples per step.

Encoder and LLM are frozen and the projector is trained, without checkpointing of activations, in one process each, one after the
other. Every step is on the same records, a batch of them, so that neither the first loss nor the padding depends on the order in which a
trainer reads. Peers read all visual tokens, as they must; TRL also runs with a model that `visionzip.attach` compressed. Where the tokens
are the same, so is the first loss: the table shows it, and the largest difference is printed below.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks import measure
from scripts.benchmarks.peer_data import RATE, make_model, make_records, our_config
from scripts.benchmarks.peer_environments import PEERS, make_environment
from scripts.benchmarks.presets import PRESETS, Preset
from visionzip.templates.llava_v1 import SYSTEM

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """A row of the table: `peer` is a name of `PEERS`, None for ours; `compressed`: at the preset's budget; `cached`: from a token cache;
    `compiled`: whole layers of the LLM compiled, with eager attention (`train.compiled`)."""

    peer: str | None = None
    compressed: bool = True
    cached: bool = False
    compiled: bool = False


ROWS = {
    "TRL": Row("TRL", compressed=False),
    "LLaMA-Factory": Row("LLaMA-Factory", compressed=False),
    "ms-swift": Row("ms-swift", compressed=False),
    "TRL with attach": Row("TRL"),
    "ours, all tokens": Row(compressed=False),
    "ours": Row(),
    "ours, token cache": Row(cached=True),
    "ours, compiled": Row(compiled=True),
    "ours, token cache, compiled": Row(cached=True, compiled=True),
}


@dataclass(frozen=True)
class Setting:
    """What all rows of a table have in common. `work` is emptied first; `environments` are kept. `batch`: in place of the preset's.
    `wheels`: see `make_environment`; ours then runs in TRL's environment, which has what the program needs."""

    preset: str
    work: Path
    environments: Path
    steps: int
    threads: int | None = None
    wheels: Path | None = None
    batch: int | None = None

    @property
    def shapes(self) -> Preset:
        preset = PRESETS[self.preset]
        return preset if self.batch is None else replace(preset, batch=self.batch)

    @property
    def python(self) -> Path:
        """Of our runs."""
        return Path(sys.executable) if self.wheels is None else self.environment("TRL")

    def environment(self, peer: str) -> Path:
        return make_environment(PEERS[peer], self.environments, self.wheels)

    @property
    def model(self) -> Path:
        return self.work / "model"

    @property
    def records(self) -> Path:
        return self.work / "records"

    def make(self) -> None:
        """The model directory and the records."""
        shutil.rmtree(self.work, ignore_errors=True)
        make_model(self.shapes, self.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        make_records(self.shapes, self.records)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the runs are processes of their own and need the room


def run(setting: Setting, rounds: int, only: list[str]) -> dict[str, Any]:
    """Every row, in turn, `rounds` times. `only`: names of `ROWS`, all where it is empty. A row that fails is named with the reason."""
    setting.make()
    wanted = {label: row for label, row in ROWS.items() if not only or label in only}
    rounds_of: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        for label, row in wanted.items():
            if label in skipped:
                continue
            print(f"round {number + 1}: {label}", file=sys.stderr, flush=True)
            try:
                rounds_of.setdefault(label, []).append(run_row(setting, row, f"{label} {number + 1}"))
            except (RuntimeError, subprocess.CalledProcessError) as error:
                skipped[label] = str(error)
                rounds_of.pop(label, None)
    preset = setting.shapes
    rows = summarize({label: found for label, found in rounds_of.items() if found}, preset.batch)
    facts = {"preset": setting.preset, "steps": setting.steps, "batch": preset.batch, "dtype": str(preset.dtype)}
    return {**facts, "rows": rows, "loss_difference": loss_difference(rows), "skipped": skipped}


def summarize(rounds_of: dict[str, list[dict[str, Any]]], batch: int) -> dict[str, dict[str, Any]]:
    """Of each row's rounds, the fastest, and how many times as fast as the fastest peer that is."""
    rows = {}
    for label, rounds in rounds_of.items():
        best = min(rounds, key=lambda found: found["seconds"])
        rows[label] = {
            "samples_per_second": batch / best["seconds"], "tokens_per_sample": best["tokens_per_step"] / batch,
            "peak_bytes": max(found["peak_bytes"] for found in rounds), "first_loss": best["first_loss"], "rounds": rounds,
        }  # fmt: skip
    peers = [row["samples_per_second"] for label, row in rows.items() if label in PEERS]
    for row in rows.values():
        row["times_the_better_peer"] = row["samples_per_second"] / max(peers) if peers else None
    return rows


def loss_difference(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Largest difference of first losses among rows on the same visual tokens, where there are two: all of them, and compressed."""
    found = {}
    for name, compressed in (("all tokens", False), ("compressed", True)):
        losses = [row["first_loss"] for label, row in rows.items() if ROWS[label].compressed is compressed]
        if len(losses) > 1:
            found[name] = max(losses) - min(losses)
    return found


def run_row(setting: Setting, row: Row, name: str) -> dict[str, Any]:
    """One run of one trainer, in a process of its own; what its probe found.

    Raises:
        RuntimeError: its environment could not be made, or it failed.
    """
    preset = setting.shapes
    compressed = {"dominant": preset.dominant, "contextual": preset.contextual}
    out = setting.work / "runs" / name.replace(" ", "-").replace(",", "")
    spec: dict[str, Any] = {
        "model": str(setting.model), "records": str(setting.records), "out": str(out), "batch": preset.batch, "steps": setting.steps,
        "rate": RATE, "dtype": str(preset.dtype).removeprefix("torch."), "threads": setting.threads,
        "system": SYSTEM,
    }  # fmt: skip
    if row.peer is not None:
        python = setting.environment(row.peer)
        return run_probed(PEERS[row.peer].kind, python, spec | {"zip": compressed if row.compressed else None})
    cache = setting.work / "tokens" if row.cached else None
    # Each of the grid's cells is one patch, so that nothing is changed and, unlike elsewhere, CLS is not kept.
    budget = compressed if row.compressed else {"selector": "pooled", "dominant": preset.full, "contextual": 0}
    config = our_config(preset, setting.model, setting.records, out, setting.steps, budget, cache, row.compiled)
    return run_ours(setting.python, config, spec)


def run_ours(python: Path, config: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Write the config, make its token cache if it names one that is not there yet, and run it.

    Raises:
        RuntimeError: the run failed.
        subprocess.CalledProcessError: making the cache failed.
    """
    path = Path(spec["out"]).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))  # JSON is YAML
    cache = config["data"]["cache"]
    if cache is not None and not Path(cache).exists():
        command = [str(python), "-m", "data.cache", "--config", str(path), "--workers", "0"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return run_probed("ours", python, spec | {"config": str(path)})


def run_probed(kind: str, python: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Start `peer_run` and wait; what its probe found.

    Raises:
        RuntimeError: it failed; the last lines of its log are in the message.
    """
    out = Path(spec["out"])
    path, log = out.with_suffix(".json"), out.with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(spec))
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(spec["threads"] or os.cpu_count() or 1), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(path.parent / "datasets"), "WANDB_MODE": "disabled", "DISABLE_VERSION_CHECK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with open(log, "w") as file:
        command = [str(python), "-m", "scripts.benchmarks.peer_run", kind, str(path)]
        code = subprocess.run(command, env=environment, stdout=file, stderr=file, cwd=ROOT).returncode
    if code:
        last = " ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise RuntimeError(f"{kind} ended with exit code {code}, see {log}: {last[-400:]}")
    return json.loads((out / "probe.json").read_text())


def show(result: dict[str, Any]) -> str:
    lines = [
        [label, f"{row['samples_per_second']:.3f}",
         f"{row['times_the_better_peer']:.2f}x" if row["times_the_better_peer"] is not None else "",
         f"{row['tokens_per_sample']:.0f}", f"{row['peak_bytes'] / 2**30:.2f}", f"{row['first_loss']:.5f}"]
        for label, row in result["rows"].items()
    ]  # fmt: skip
    headers = ["trainer", "samples/s", "of the better peer", "LLM tokens per sample", "peak GiB", "first loss"]
    parts = [
        f"{result['preset']}: {result['batch']} samples per step, median of {result['steps'] - 1} steps, {result['dtype']}",
        measure.table(headers, lines),
        *(
            f"first losses with {name} differ by at most {value:.1e}"
            for name, value in result["loss_difference"].items()
        ),
        *(f"{label}: left out, {why}" for label, why in result["skipped"].items()),
    ]
    return "\n\n".join(parts)
