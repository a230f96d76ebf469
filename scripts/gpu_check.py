"""What `scripts/gpu_check.sh` runs. One part after the other, each on a budget of time; a part that fails is told, not hidden."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks import encoder, exactness, measure, peers, prefill, train
from train.packing import variable_length

LIMIT = 450.0
"""Seconds after which no part is begun (it is left out and named) and a running one begins no further round: the longest takes
some 60 s more."""

Value = Callable[[dict[str, Any]], float]

#: What is wanted, and how: what, the limit, whether it is the least or the most, and its figure. `found` is every part's result.
TARGETS: list[tuple[str, str, float, bool, Value]] = [
    ("CLIP-L: encoder + compression, of the plain encoder", "≤", 1.0, False,
     lambda found: found["encoder"]["clip"]["ours_over_plain"]),
    ("CLIP-L: all maps, of encoder + compression", "≥", 2.0, True, lambda found: found["encoder"]["clip"]["all_maps_over_ours"]),
    ("CLIP-L: the slowest selector, share of the encoder", "≤", 0.05, False,
     lambda found: max(found["encoder"]["clip"]["share_of_encoder"].values())),
    ("SigLIP: attention received, share of the encoder", "≤", 0.03, False,
     lambda found: found["encoder"]["siglip"]["share_of_encoder"]["attention received"]),
    ("NeXT-7B prefill, 160 of 2,880 tokens, one prompt: times as fast", "≥", 8.0, True, lambda found: found["prefill"]["one"]["faster"]),
    ("the same, eight prompts at once", "≥", 8.0, True, lambda found: found["prefill"]["eight"]["faster"]),
    ("7B: times the plain recipe on the same tokens", "≥", 1.8, True, lambda found: best(found, "7b")["faster_than_plain"]),
    ("7B: times the recipe on all 576", "≥", 5.0, True, lambda found: best(found, "7b")["faster_than_plain, all tokens"]),
    ("7B: model FLOP utilisation", "≥", 0.5, True, lambda found: best(found, "7b")["model_flop_utilisation"]),
    ("7B: minutes for 66,500 samples at 64 tokens", "≤", 20.0, False,
     lambda found: 66_500 / best(found, "7b")["samples_per_second"] / 60),
    ("13B: model FLOP utilisation", "≥", 0.5, True, lambda found: best(found, "13b")["model_flop_utilisation"]),
    ("NeXT-7B: model FLOP utilisation", "≥", 0.5, True, lambda found: best(found, "next")["model_flop_utilisation"]),
    ("13B compressed, of 7B uncompressed, samples/s", "≥", 1.0, True,
     lambda found: best(found, "13b")["samples_per_second"] / found["train-7b"]["ways"]["plain, all tokens"]["samples_per_second"]),
    ("7B from pixels: times TRL on all tokens", "≥", 7.0, True, lambda found: found["peers"]["rows"]["ours"]["times_the_better_peer"]),
    ("7B from the token cache: times TRL on all tokens", "≥", 8.0, True,
     lambda found: found["peers"]["rows"]["ours, token cache"]["times_the_better_peer"]),
]  # fmt: skip


def best(found: dict[str, Any], model: str) -> dict[str, Any]:
    """The fastest way that is exact: with the cache, and with compiled norms and MLPs where that pays."""
    ways = found[f"train-{model}"]["ways"]
    fast = [ways[name] for name in ("fast + cache", "fast + cache, torch.compile") if name in ways]
    return max(fast, key=lambda way: way["samples_per_second"])


PEER_ROWS = ["TRL", "TRL with attach", "ours, all tokens", "ours", "ours, token cache"]
PEER_BATCH = 8
"""Samples per step of TRL and ours: activations of all 576 tokens, not checkpointed, take some 45 GB (arithmetic) beside the weights."""


def compare_peers(small: bool, out: Path, wheels: Path) -> dict[str, Any]:
    """TRL beside `train.py` at LLaVA-1.5-7B's shapes, each in a process of its own that reads the weights (14 GB) from `out`."""
    name = "tiny" if small else "llava-1.5-7b"
    setting = peers.Setting(name, out / "work", out / "environments", steps=6, wheels=wheels, batch=PEER_BATCH)
    try:
        return peers.run(setting, rounds=1, only=PEER_ROWS)
    finally:
        shutil.rmtree(setting.model, ignore_errors=True)


def parts(
    device: torch.device, small: bool, until: float, peers_out: Path, wheels: Path | None
) -> dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]]:
    """Name → (run, show), in the order of importance. `small`: the same with tiny shapes, to try the script without a GPU."""
    half = torch.float32 if small else torch.bfloat16
    geometry = lambda name: "tiny" if small else name  # noqa: E731
    rounds, images, prompts = (1, 2, 2) if small else (5, 32, 8)
    everything = {
        "golden": (lambda: exactness.golden(device), exactness.show),
        "gradients": (lambda: exactness.gradients(device, [torch.float32] if small else [torch.float32, torch.bfloat16]), exactness.show),
        "encoder": (
            lambda: {
                "clip": encoder.run(geometry("clip-l-336"), images, rounds, device, half, selectors=True),
                "siglip": encoder.run("tiny-siglip" if small else "siglip-so400m-384", images, rounds, device, half),
            },
            lambda r: "\n\n".join(encoder.show(r[name]) for name in ("clip", "siglip")),
        ),
        "prefill": (
            lambda: {
                "one": prefill.run(geometry("llava-next-7b"), rounds, device),
                "eight": prefill.run(geometry("llava-next-7b"), rounds, device, prompts),
            },
            lambda r: "\n\n".join(prefill.show(r[name]) for name in ("one", "eight")),
        ),
        "train-7b": (lambda: train.run(geometry("llava-1.5-7b"), 1 if small else 3, device, parts=True, until=until), train.show),
        "train-13b": (lambda: train.run(geometry("llava-1.5-13b"), 2, device, uncompressed=False, until=until), train.show),
        "train-next": (lambda: train.run(geometry("llava-next-7b"), 2, device, uncompressed=False, until=until), train.show),
    }  # fmt: skip
    if wheels is not None:
        everything["peers"] = (lambda: compare_peers(small, peers_out, wheels), peers.show)
    return everything


def judged(found: dict[str, Any]) -> list[list[str]]:
    """A row a target: what, wanted, measured, met."""
    rows = []
    for what, sign, limit, at_least, value in TARGETS:
        try:
            got = value(found)
        # Its part was not asked for or failed, or one of its ways, or all of them, took too much memory.
        except (KeyError, ValueError):
            rows.append([what, f"{sign} {limit:g}", "not run", ""])
            continue
        rows.append(
            [what, f"{sign} {limit:g}", f"{got:.3g}", "yes" if (got >= limit if at_least else got <= limit) else "NO"]
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check.json"), help="every figure, written after each part"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        help="a folder with TRL's wheel and those of what it needs: also compare with TRL (some minutes more)",
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
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train.packing").setLevel(logging.INFO)  # says why there is no variable-length kernel
    device = torch.device("cpu" if given.small else "cuda")
    if given.small:
        torch.set_num_threads(1)
    begun, found, failed = time.perf_counter(), {}, []
    everything = parts(device, given.small, begun + LIMIT, given.out.parent / "peers", given.wheels)
    unknown = set(filter(None, given.only.split(","))) - everything.keys()
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    environment = measure.environment(device)
    one_kernel = variable_length(device, torch.bfloat16, 128, 1, 128**-0.5)  # heads of LLaVA's LLMs
    environment["packed attention"] = "one variable-length kernel" if one_kernel else "sample by sample"
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
            if not found[name].get("passed", True) or found[name].get("skipped"):
                failed.append(name)
        except Exception as error:  # the other parts are still worth their minutes
            failed.append(name)
            print(f"\n## {name}\n\nFAILED: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
        gc.collect()
        if device.type == "cuda":
            torch._dynamo.reset()  # its caches hold on to a part's model
            torch.cuda.empty_cache()
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"environment": environment, **found}, default=str))
    targets = judged(found)
    given.out.write_text(json.dumps({"environment": environment, **found, "targets": targets}, default=str))
    note = "\n\n(tiny shapes: these figures mean nothing)" if given.small else ""
    print(f"\n## Against the targets{note}\n\n{measure.table(['what', 'wanted', 'measured', 'met'], targets)}")
    print(f"\n{time.perf_counter() - begun:.0f} s in all; every figure in {given.out}")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
