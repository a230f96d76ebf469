"""What `scripts/gpu_check.sh` runs. One part after the other, each on a budget of time; a part that fails is told, not hidden."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks import encoder, exactness, measure, prefill, train

LIMIT = 510.0
"""Seconds for everything. A part that is not begun by then is left out and named."""

#: part → (what, as wanted, its figure, the limit, whether it is the least or the most).
TARGETS: dict[str, list[tuple[str, str, Callable[[dict[str, Any]], float], float, bool]]] = {
    "encoder": [
        ("CLIP-L: encoder + compression, of the plain encoder", "≤ 1.0", lambda r: r["clip"]["ours_over_plain"], 1.0, False),
        ("CLIP-L: all maps, of ours", "≥ 2", lambda r: r["clip"]["all_maps_over_ours"], 2.0, True),
        ("SigLIP: attention received, share of the encoder", "≤ 0.03", lambda r: r["siglip"]["share_of_encoder"]["attention received"], 0.03, False),
    ],
    "prefill": [("LLaVA-NeXT-7B prefill, 160 of 2,880 tokens, times as fast", "≥ 8", lambda r: r["faster"], 8.0, True)],
    "train-7b": [
        ("7B: times the plain recipe, same tokens", "≥ 1.8", lambda r: best(r)["faster_than_plain"], 1.8, True),
        ("7B: times the recipe on all 576", "≥ 5", lambda r: best(r)["faster_than_plain, all tokens"], 5.0, True),
        ("7B: model FLOP utilisation", "≥ 0.5", lambda r: best(r)["model_flop_utilisation"], 0.5, True),
        ("7B: minutes for 66,500 samples at 64 tokens", "≤ 20", lambda r: 66_500 / best(r)["samples_per_second"] / 60, 20.0, False),
    ],
}  # fmt: skip


def best(result: dict[str, Any]) -> dict[str, Any]:
    return result["ways"]["fast + cache"]


def parts(
    device: torch.device, small: bool
) -> dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]]:
    """Name → (run, show), in the order of importance. `small`: the same with tiny shapes, to try the script without a GPU."""
    half = torch.float32 if small else torch.bfloat16
    geometry = lambda name: "tiny" if small else name  # noqa: E731
    rounds, pictures = (1, 2) if small else (5, 32)
    return {
        "golden": (lambda: exactness.golden(device), exactness.show),
        "gradients": (lambda: exactness.gradients(device, [torch.float32] if small else [torch.float32, torch.bfloat16]), exactness.show),
        "encoder": (
            lambda: {
                "clip": encoder.run(geometry("clip-l-336"), pictures, rounds, device, half, selectors=True),
                "siglip": encoder.run(geometry("siglip-so400m-384") if not small else "tiny-siglip", pictures, rounds, device, half),
            },
            lambda r: "\n\n".join(encoder.show(r[name]) for name in ("clip", "siglip")),
        ),
        "prefill": (lambda: prefill.run(geometry("llava-next-7b"), rounds, device), prefill.show),
        "train-7b": (lambda: train.run(geometry("llava-1.5-7b"), 1 if small else 2, device, parts=True, uncompressed=True), train.show),
        "train-13b": (lambda: train.run(geometry("llava-1.5-13b"), 1, device, uncompressed=False), train.show),
        "train-next": (lambda: train.run(geometry("llava-next-7b"), 1, device, uncompressed=False), train.show),
    }  # fmt: skip


def judged(found: dict[str, Any]) -> str:
    rows = []
    for name, targets in TARGETS.items():
        for what, wanted, value, limit, at_least in targets:
            if name not in found:
                rows.append([what, wanted, "not run", ""])
                continue
            got = value(found[name])
            rows.append([what, wanted, f"{got:.3g}", "yes" if (got >= limit if at_least else got <= limit) else "NO"])
    if {"train-7b", "train-13b"} <= found.keys() and "plain, all tokens" in found["train-7b"]["ways"]:
        got = (
            best(found["train-13b"])["samples_per_second"]
            / found["train-7b"]["ways"]["plain, all tokens"]["samples_per_second"]
        )
        rows.append(["13B compressed, of 7B uncompressed, samples/s", "> 1", f"{got:.3g}", "yes" if got > 1 else "NO"])
    return measure.table(["what", "wanted", "measured", "met"], rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check.json"), help="every figure, written after each part"
    )
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes on the CPU: tries the script, measures nothing"
    )
    given = parser.parse_args(argv)
    if not torch.cuda.is_available() and not given.small:
        print(
            "gpu_check needs an NVIDIA GPU that torch can use, and there is none here (--small tries the script on the CPU)",
            file=sys.stderr,
        )
        return 2
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device("cpu" if given.small else "cuda")
    begun, found, failed = time.perf_counter(), {}, []
    everything = parts(device, given.small)
    unknown = set(filter(None, given.only.split(","))) - everything.keys()
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    environment = measure.environment(device)
    print("# GPU check\n\n" + ", ".join(f"{key} {value}" for key, value in environment.items()), flush=True)
    for name, (run, show) in everything.items():
        if given.only and name not in given.only.split(","):
            continue
        seconds = time.perf_counter() - begun
        if seconds > LIMIT:
            print(f"\n## {name}\n\nleft out: {seconds:.0f} s were used", flush=True)
            continue
        start = time.perf_counter()
        try:
            found[name] = run()
            print(f"\n## {name} ({time.perf_counter() - start:.0f} s)\n\n{show(found[name])}", flush=True)
            if name in ("golden", "gradients") and not found[name]["passed"]:
                failed.append(name)
        except Exception as error:  # the other parts are still worth their minutes
            failed.append(name)
            print(f"\n## {name}\n\nFAILED: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"environment": environment, **found}, default=str))
    if not given.small:
        print(f"\n## Against the targets\n\n{judged(found)}")
    print(f"\n{time.perf_counter() - begun:.0f} s in all; every figure in {given.out}")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
