"""Do per-image budgets buy accuracy at the same mean? On the embedded model, training-free and fine-tuned.

    python -m scripts.adaptive_budgets --out runs/adaptive

One fixed budget against budgets that stop early, by attention held and by coverage, calibrated to the same mean on training
images. Each is a run of `train.py` with `configs/tiny-llava/sweep.yaml` on a token cache, for each seed; a run that is there
already is not run again. Prints the table of docs/budgets.md and writes OUT/adaptive.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONFIG = "configs/tiny-llava/sweep.yaml"
MODEL = "data/tiny-llava"
FIXED = {"dominant": 13, "contextual": 3}
MOST = {"dominant": 27, "contextual": 3}
CALIBRATION = 400  # training images
MEASURES = ("attention", "coverage")


def make_images(folder: Path, limit: int | None = None) -> Iterator[Any]:
    from visionzip.analysis.image_files import find_images

    return (picture for _, picture in find_images(folder, limit).images())


def variants(data: Path, selector: str, mean: float) -> dict[str, dict[str, Any]]:
    """Name → `zip` section and how many tokens held-out images keep."""
    from visionzip import ZipConfig, attached, load
    from visionzip.analysis.calibrate import calibrated
    from visionzip.analysis.trace import image_inputs, to_model
    from visionzip.attach import attach
    from visionzip.config import Adaptive

    found: dict[str, dict[str, Any]] = {"fixed": {**FIXED, "selector": selector}}
    model, processor = load(MODEL, "cpu", config=ZipConfig(**MOST, selector=selector))
    for measure in MEASURES:
        attach(model, processor, ZipConfig(**MOST, selector=selector))
        attachment = attached(model)
        assert attachment is not None
        start = Adaptive(threshold=0.5, measure=measure)
        result = calibrated(attachment, processor, make_images(data / "images" / "train", CALIBRATION), mean, start)
        found[measure] = result.config.model_dump(exclude_none=True)
    for name, section in found.items():
        attach(model, processor, ZipConfig(**section))
        attachment = attached(model)
        assert attachment is not None
        inputs = (to_model(model, image_inputs(processor, each)) for each in make_images(data / "images" / "eval"))
        kept = sorted(len(picture) for each in inputs for picture in attachment.compress(**each))
        spread = [kept[0], kept[len(kept) // 10], kept[len(kept) // 2], kept[len(kept) * 9 // 10], kept[-1]]
        found[name] = {"zip": section, "mean": statistics.mean(kept), "spread": spread}
    return found


def call(module: list[str], threads: int) -> None:
    subprocess.run([sys.executable, *module], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True)


def tune(name: str, section: dict[str, Any], seed: int, out: Path, steps: int, threads: int) -> dict[str, Any]:
    """One run of train.py; its results."""
    folder, tokens = out / f"{name}-{steps}-{seed}", out / f"tokens-{name}"
    results = folder / "report" / "results.json"
    if not results.exists():
        data = out / "data"
        overrides = [
            f"zip={json.dumps(section)}", f"seed={seed}", f"trainer.max_steps={steps}", "eval.compare=[training_free]", f"output_dir={folder}", f"data.cache={tokens}",
            f"data.sources.0.path={data}/train.json", f"data.sources.0.images={data}/images",
            f"eval.sources.0.path={data}/eval.json", f"eval.sources.0.images={data}/images",
        ]  # fmt: skip
        call(["-m", "data.cache", "--config", CONFIG, "--workers", "0", *overrides], threads)
        call(["train.py", "--config", CONFIG, *overrides], threads)
    return json.loads(results.read_text(encoding="utf-8"))


def percent(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def table(found: dict[str, dict[str, Any]], questions: int) -> str:
    lines = ["| budget | tokens held out: mean | least, 10 %, median, 90 %, most | training-free | fine-tuned |", "|---|---|---|---|---|"]  # fmt: skip
    for name, each in found.items():
        spread = ", ".join(map(str, each["spread"]))
        tuned = percent(each["fine_tuned"])
        lines.append(f"| {name} | {each['mean']:.2f} | {spread} | {100 * each['training_free']:.1f} | {tuned} |")
    noise = 100 * (0.25 / questions) ** 0.5
    lines.append(
        f"\n{questions} held-out questions: one standard error of a single accuracy is at most {noise:.1f} points."
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.adaptive_budgets", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive"))
    parser.add_argument("--mean", type=float, default=16.0, help="tokens per image; the fixed budget is 16")
    parser.add_argument("--selector", default="visionzip")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning, 64 conversations each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    out = args.out.resolve()
    call(["-m", "data.shapes", "--out", str(out / "data")], args.threads)
    found = variants(out / "data", args.selector, args.mean)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = {
            name: [pool.submit(tune, name, each["zip"], seed, out, args.steps, args.threads) for seed in seeds]
            for name, each in found.items()
        }
    for name, each in found.items():
        runs = [run.result() for run in pending[name]]
        each |= {"training_free": runs[0]["training_free"], "fine_tuned": [run["fine_tuned"] for run in runs]}
        each["by_type"] = [run["by_type"] for run in runs]
    questions = runs[0]["questions"]
    (out / "adaptive.json").write_text(json.dumps({"questions": questions, "variants": found}, indent=1) + "\n")
    print(table(found, questions))


if __name__ == "__main__":
    main()
