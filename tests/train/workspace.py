"""A model directory, images and conversations small enough to train in a moment, and runs of `train.py` on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def make_workspace(folder: Path, records: int = 24, **model: Any) -> Path:
    """`model/`, `images/`, `train.json`, `heldout.json`. Every fourth record has no image; answers differ in length."""
    from tests.tiny import tiny_llava, tiny_processor

    tiny_llava(**model).save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(records + 6):
        colour = "red" if number % 2 else "blue"
        noise = rng.integers(-25, 25, (32, 32, 3))
        Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(
            folder / "images" / f"{number}.png"
        )
        answer = [colour, f"a {colour} circle", f"this is a {colour} square"][number % 3]
        turns = [("what is this", answer)] + [("how many circle", "two")] * (number % 3)
        record: dict[str, Any] = {"id": f"r{number}", "conversations": []}
        if number % 4:
            record["image"] = f"{number}.png"
        for turn, (question, reply) in enumerate(turns):
            mark = "<image>\n" if turn == 0 and "image" in record else ""
            record["conversations"] += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": reply}]
        rows.append(record)
    (folder / "train.json").write_text(json.dumps(rows[:records]))
    (folder / "heldout.json").write_text(json.dumps(rows[records:]))
    return folder


def config_of(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run config as a dict; `changes` are dotted keys with `__` for the dots."""
    config: dict[str, Any] = {
        "output_dir": str(output),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "zip": {"dominant": 5, "contextual": 2},
        "data": {
            "sources": [{"path": str(folder / "train.json"), "images": str(folder / "images")}],
            "template": "llava_v1",
            "max_length": 128,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "deepspeed": "zero2",
            "learning_rate": 1e-2,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "global_batch_size": 8,
            "save_strategy": "no",
            "hang_timeout": 60.0,
        },
        "wandb": {"enabled": False},
        "report": {"enabled": False},
    }
    for key, value in changes.items():
        section, *path = key.split("__")
        target = config
        for part in [section, *path][:-1]:
            target = target.setdefault(part, {})
        target[[section, *path][-1]] = value
    return config


def write_config(config: dict[str, Any]) -> Path:
    path = Path(config["output_dir"]).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def environment(**extra: str) -> dict[str, str]:
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    }
    return {
        **clean,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def command(script: list[str], launcher: str = "python", processes: int = 1) -> list[str]:
    """How a Python script is started."""
    bin_dir = Path(sys.executable).parent
    if launcher == "python":
        return [sys.executable, *script]
    from train.launch import free_port

    port = ["--master_port", str(free_port())]
    if launcher == "deepspeed":
        return [str(bin_dir / "deepspeed"), "--num_accelerators", str(processes), *port, *script]
    return [str(bin_dir / "torchrun"), "--nproc_per_node", str(processes), *port, *script]


def train_script(config: dict[str, Any]) -> list[str]:
    return [str(ROOT / "train.py"), "--config", str(write_config(config))]


def launch(
    config: dict[str, Any] | list[dict[str, Any]],
    launcher: str = "python",
    processes: int = 1,
    *,
    expect: int | None = 0,
    timeout: float = 280,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run to the end and return what was printed; `expect` is the exit code, None for any. A list runs in the same processes."""
    if isinstance(config, list):
        script = [str(ROOT / "tests" / "train" / "many.py"), *(str(write_config(c)) for c in config)]
    else:
        script = train_script(config)
    done = subprocess.run(
        command(script, launcher, processes),
        cwd=ROOT,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if expect is not None and done.returncode != expect:
        raise AssertionError(
            f"exit code {done.returncode}, expected {expect}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )
    return done


def losses(output: Path) -> list[float]:
    from train.callbacks import read_metrics

    return [line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line]


def projector(output: Path) -> dict[str, torch.Tensor]:
    from visionzip.export import read_export

    return read_export(output).projector


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Ranks:
    """Runs started from a zygote (tests/train/zygote.py): real processes, without the seconds of importing."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "train" / "zygote.py")],
            cwd=ROOT,
            env=environment(WANDB_MODE="offline"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert "ready" in self._read()

    def start(self, *configs: dict[str, Any], world: int = 2, **options: Any) -> list[int]:
        """Start ranks that run these configs one after the other; returns their process ids."""
        paths = [str(write_config(config)) for config in configs]
        self.log = Path(configs[0]["output_dir"]).with_suffix(".log")
        self.log.unlink(missing_ok=True)
        request = {"configs": paths, "world": world, "log": str(self.log), **options}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()["pids"]

    def wait(self) -> list[int]:
        """Exit codes of the ranks; negative where a signal ended one."""
        return self._read()["codes"]

    def run(self, *configs: dict[str, Any], world: int = 2, **options: Any) -> str:
        """Start, wait, expect success; returns what was printed."""
        self.start(*configs, world=world, **options)
        codes = self.wait()
        if any(codes):
            raise AssertionError(f"exit codes {codes}\n{self.output()[-6000:]}")
        return self.output()

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the zygote ended with {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
