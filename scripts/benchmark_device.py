"""A question about an image on a device: PyTorch beside ONNX Runtime, each row in a process of its own.

    python -m scripts.benchmark_device --model runs/real/model --export runs/real-onnx --export runs/real-onnx-int8 \
        --image photo.jpg --budgets all,64,32,16 --threads 1,2

Columns: seconds from the question to the first token of the answer (image decoding, encoder and prefill included; median of
`--repeats` after one that is not counted), tokens/s after it, peak memory of the process by the operating system (``ru_maxrss`` of
``wait4``), bytes of keys and values after `TOKENS` answered tokens, and size of the files a device needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from scripts.processes import run_measured

TOKENS = 24
QUESTION = "What is in the middle of the image?"


def measure_onnx(directory: str, budget: str, threads: int, image: str, repeats: int) -> dict[str, float]:
    from visionzip.device import load

    model = load(directory, threads)
    model.package = dataclasses.replace(model.package, end_ids=[])  # as many tokens in every row
    found = [model.ask(image, QUESTION, budget, limit=TOKENS) for _ in range(repeats + 1)][1:]
    needed = {model.package.language["file"], model.package.budgets[budget]["file"], "weights.data", "tokenizer.json"}
    return {
        "first": statistics.median(each.first for each in found),
        "rate": statistics.median((each.tokens - 1) / (each.seconds - each.first) for each in found),
        "cache": found[-1].cache_bytes,
        "files": sum((Path(directory) / name).stat().st_size for name in needed),
    }


def measure_torch(source: str, budget: str, threads: int, image: str, repeats: int) -> dict[str, float]:
    import torch

    import visionzip
    from visionzip.budgets import parse_budget
    from visionzip.chat import Chat
    from visionzip.config import ZipConfig
    from visionzip.decode import decode_image

    torch.set_num_threads(threads)
    config = parse_budget(budget)
    model, processor = visionzip.load(source, "cpu", "float32", config=config or ZipConfig(dominant=13, contextual=3))
    model.generation_config.eos_token_id = None
    found, cache = [], None
    chat = Chat(model, processor, max_new_tokens=TOKENS)
    if config is None:
        chat.budget(None)
    for _ in range(repeats + 1):
        chat.reset()
        chat.show(decode_image(image))
        found.append(chat.ask(QUESTION))
        cache = chat._cache
    found = found[1:]
    files = Path(source) if Path(source).is_dir() else Path(source).parent
    return {
        "first": statistics.median(each.first for each in found),
        "rate": statistics.median((each.tokens - 1) / (each.seconds - each.first) for each in found),
        "cache": sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values)),  # type: ignore[attr-defined]
        "files": sum(path.stat().st_size for path in files.glob("*.safetensors")),
    }


def in_a_process(engine: str, source: str, budget: str, threads: int, given: argparse.Namespace) -> dict[str, Any]:
    """One row, measured in a fresh process, with its peak memory in bytes.

    Raises:
        RuntimeError: it failed; with its last lines.
    """
    arguments = ["-m", "scripts.benchmark_device", "--row", json.dumps([engine, source, budget, threads])]
    arguments += ["--image", str(given.image), "--repeats", str(given.repeats)]
    printed, peak = run_measured(arguments, threads)
    return {**json.loads(printed.splitlines()[-1]), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the PyTorch model, or anything that was fine-tuned")
    parser.add_argument("--export", action="append", default=[], help="an ONNX export of it; can be given again")
    parser.add_argument("--image", required=True, type=Path)
    parser.add_argument("--budgets", default="all,64,32,16")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        engine, source, budget, threads = given.row
        measure = measure_torch if engine == "PyTorch" else measure_onnx
        print(json.dumps(measure(source, budget, threads, str(given.image), given.repeats)))
        return
    print(
        "| threads | engine | visual tokens | first token (s) | tokens/s | peak memory (MB) | KV cache (kB) | files (MB) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    sources = [("PyTorch", given.model)] * bool(given.model) + [
        (f"ONNX Runtime, {Path(path).name}", path) for path in given.export
    ]
    for threads in map(int, given.threads.split(",")):
        for engine, source in sources:
            for budget in given.budgets.split(","):
                found = in_a_process(engine, str(source), budget, threads, given)
                megabytes = (found["peak"] / 1e6, found["cache"] / 1e3, found["files"] / 1e6)
                print(
                    f"| {threads} | {engine} | {budget} | {found['first']:.3f} | {found['rate']:.1f} | "
                    + " | ".join(f"{value:,.0f}" for value in megabytes) + " |",
                    flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
