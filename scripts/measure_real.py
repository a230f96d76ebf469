"""Peak memory and samples/s of fine-tuning the real model: from pixels and from the token cache, with all tokens and with few.

    python -m scripts.measure_real --model runs/real/model --data runs/real/data

Each row is `train.py` with `configs/smol-llava/ft-32.yaml` in a process of its own: its peak memory is the operating system's figure, its
speed the median over the logged steps but the first two, in which layers are compiled. One process; `--threads` sets its threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from scripts.bad_input import exit_code_of
from scripts.processes import ROOT, run_measured

CONFIG = ROOT / "configs" / "smol-llava" / "ft-32.yaml"
FIRST = 2  # logged steps that are not counted


def tokens_of(model: Path) -> int:
    """Tokens the encoder makes of an image, CLS included."""
    vision = json.loads((model / "config.json").read_text())["vision_config"]
    return int((vision["image_size"] // vision["patch_size"]) ** 2 + 1)


def overrides(given: argparse.Namespace, budget: tuple[int, int], cache: Path | None) -> list[str]:
    source = {
        "path": str(given.data / "train.json"),
        "images": str(given.data / "images"),
        "max_samples": given.samples,
    }
    return [
        "--config", str(CONFIG), f"model.path={given.model}", f"data.sources={json.dumps([source])}",
        f"data.cache={cache or 'null'}", f"zip.dominant={budget[0]}", f"zip.contextual={budget[1]}", *given.overrides,
    ]  # fmt: skip


def measure(given: argparse.Namespace, folder: Path, budget: tuple[int, int], cached: bool) -> tuple[float, int]:
    """(samples/s, bytes)."""
    cache = folder / "tokens" if cached else None
    settings = overrides(given, budget, cache)
    if cached:
        run_measured(["-m", "data.cache", *settings], given.threads)
    out = folder / "run"
    more = [f"output_dir={out}", "eval=null", "report.enabled=false", f"trainer.max_steps={given.steps + FIRST}",
            "trainer.logging_steps=1", "trainer.save_strategy=no", "trainer.deepspeed=off", "trainer.resume=null"]  # fmt: skip
    _, memory = run_measured(["train.py", *settings, *more], given.threads)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["samples_per_second"] for row in rows if "samples_per_second" in row]
    return statistics.median(speeds[FIRST:]), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "real" / "model", help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "real" / "data", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=64, help="records to train on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps counted (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes of every row, e.g. model.dtype=float32"
    )
    given = parser.parse_args()
    given.model, given.data = given.model.resolve(), given.data.resolve()
    every = tokens_of(given.model)
    print("| tokens | from | samples/s | peak memory |\n|---|---|---|---|", flush=True)
    for budget in ((every, 0), (27, 5)):
        for cached in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                speed, memory = measure(given, Path(folder), budget, cached)
            source = "cache" if cached else "pixels"
            print(f"| {sum(budget)} | {source} | {speed:.2f} | {memory / 2**30:.2f} GB |", flush=True)


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
