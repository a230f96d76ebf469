"""Benchmarks, the plain way and the fast way alternately in one process.

python -m scripts.benchmark encoder                          what compression costs the encoder
python -m scripts.benchmark train --preset llava-1.5-7b      a training step: samples/s, utilisation, bound
python -m scripts.benchmark cache                            the token cache: size, writing, reading
python -m scripts.benchmark batching --preset llava-1.5-7b   padding, and waiting for other ranks (counted)
python -m scripts.benchmark prefill --preset llava-next-7b   from the prompt to the first token
python -m scripts.benchmark plan --preset cpu                the time that visionzip plan predicts, against a short run
python -m scripts.benchmark profile --preset cpu             where the time of a training step goes
python -m scripts.benchmark peers --preset cpu               beside TRL, LLaMA-Factory and ms-swift, each in its own environment

Each prints a table, and with --json one object with every figure. Presets other than cpu, llava-1.5-7b-proportions and tiny need a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks import batching, cache, encoder, measure, peers, plan, prefill, profile, train
from scripts.benchmarks.presets import PRESETS

ON_CPU = ("cpu", "llava-1.5-7b-proportions", "tiny")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=["encoder", "train", "cache", "batching", "prefill", "plan", "profile", "peers"]
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="cpu", help="model shapes, for train, cache and prefill"
    )
    parser.add_argument("--encoder", choices=list(encoder.ENCODERS), default="clip-l-336", help="geometry, for encoder")
    parser.add_argument("--batch", type=int, default=1, help="images or prompts at once, for encoder and prefill")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; the median counts")
    parser.add_argument("--entries", type=int, default=4000, help="images in the cache")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="processes that read the cache")
    parser.add_argument("--parts", action="store_true", help="train: also leave out one part of the fast way at a time")
    parser.add_argument(
        "--selectors", action="store_true", help="encoder: every selector's share of the encoder's time"
    )
    parser.add_argument("--uncompressed", action="store_true", help="train: also the recipe with all visual tokens")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/visionzip-ft/peers"),
        help="peers, plan, profile: environments and working files (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="peers, plan, profile: steps of a run; the first is not timed"
    )
    parser.add_argument("--only", nargs="+", default=[], choices=list(peers.ROWS), help="peers: these rows only")
    parser.add_argument(
        "--wheels", type=Path, help="peers: install from this folder, beside the torch of this environment"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    given = parser.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (
        device.type == "cpu"
        and given.what in ("train", "prefill", "plan", "profile", "peers")
        and given.preset not in ON_CPU
    ):
        print(
            f"the preset {given.preset} needs a GPU and there is none here; presets for the CPU: {', '.join(ON_CPU)}",
            file=sys.stderr,
        )
        return 2
    warnings.filterwarnings("ignore", category=FutureWarning)
    facts = measure.environment(device)
    result, shown = run(given, device)
    facts["load_after"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    result = {"benchmark": given.what, "environment": facts, **result}
    print(json.dumps(result) if given.json else f"{shown}\n\n{', '.join(f'{k} {v}' for k, v in facts.items())}")
    return 0


def run(given: Any, device: torch.device) -> tuple[dict[str, Any], str]:
    if given.what == "encoder":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        result = encoder.run(given.encoder, given.batch, given.rounds, device, dtype, given.selectors)
        return result, encoder.show(result)
    if given.what == "train":
        result = train.run(given.preset, given.rounds, device, given.parts, given.uncompressed)
        return result, train.show(result)
    if given.what == "prefill":
        result = prefill.run(given.preset, given.rounds, device, given.batch)
        return result, prefill.show(result)
    if given.what == "plan":
        result = plan.run(setting(given))
        return result, plan.show(result)
    if given.what == "profile":
        result = profile.run(setting(given))
        return result, profile.show(result)
    if given.what == "peers":
        result = peers.run(setting(given), given.rounds, given.only)
        return result, peers.show(result)
    if given.what == "batching":
        result = batching.run(
            given.preset, [(1, 8, 128), (8, 1, 128), (8, 2, 128), (64, 1, 128), (64, 1, 1024), (64, 2, 1024)]
        )
        return result, batching.show(result)
    result = cache.run(given.preset, given.entries, given.workers)
    return result, cache.show(result)


def setting(given: Any) -> peers.Setting:
    folder = given.cache.expanduser().resolve()
    return peers.Setting(
        given.preset,
        folder / "work" / f"{given.what}-{given.preset}",
        folder / "environments",
        given.steps,
        given.threads,
        given.wheels,
    )


if __name__ == "__main__":
    sys.exit(main())
