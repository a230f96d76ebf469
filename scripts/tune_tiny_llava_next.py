"""Fine-tune the projector of `data/tiny-llava-next` at several budgets and seeds, and write down what that wins back.

    python -m scripts.tune_tiny_llava_next --threads 2

Runs `train.py --config configs/tiny-llava-next/ft.yaml` once for each, as anybody would, and collects the runs' own
`results.json` in `data/tiny-llava-next/results.json`, which `python -m scripts.models_page` shows in docs/models.md. A run that is
there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = "configs/tiny-llava-next/ft.yaml"
RESULTS = ROOT / "data" / "tiny-llava-next" / "results.json"
BUDGETS = ((13, 3), (7, 1))  # dominant, contextual of a tile
SEEDS = (0, 1, 2)
ABOUT = (
    "`data/tiny-llava-next` is a LLaVA-NeXT of the embedded model's size: an image becomes the downscaled image and two tiles, 180 tokens "
    "with the newlines. Its projector was fine-tuned with everything else frozen, on the images of `data/shapes`, which are read like any "
    "user's data; {questions} held-out questions, exact match."
)


def tune(dominant: int, contextual: int, seed: int, out: Path, threads: int) -> dict:
    """One run of train.py; its results."""
    folder = out / f"{dominant}-{contextual}-{seed}"
    results = folder / "report" / "results.json"
    if not results.exists():
        overrides = [f"zip.dominant={dominant}", f"zip.contextual={contextual}", f"seed={seed}", f"output_dir={folder}"]
        command = [sys.executable, "train.py", "--config", CONFIG, *overrides]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True)
    return json.loads(results.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tune_tiny_llava_next", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "tiny-llava-next")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    subprocess.run([sys.executable, "-m", "data.shapes", "--out", "runs/shapes"], cwd=ROOT, check=True)
    runs = [tune(*budget, seed, args.out, args.threads) for budget in BUDGETS for seed in SEEDS]
    kept = ("tokens", "seed", "training_free", "fine_tuned")
    found = {
        "about": ABOUT.format(questions=runs[0]["questions"]),
        "command": "python -m scripts.tune_tiny_llava_next",
        "full": runs[0]["full"],
        "of_tokens": runs[0]["of_tokens"],
        "runs": [{key: run[key] for key in kept} for run in runs],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for run in found["runs"]:
        print(f"{run['tokens']} of {found['of_tokens']} tokens, seed {run['seed']}: {run['training_free']:.1%} → {run['fine_tuned']:.1%} "
              f"(all tokens: {found['full']:.1%})")  # fmt: skip


if __name__ == "__main__":
    main()
