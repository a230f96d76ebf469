"""Load on a server at several budgets, measured by vLLM's own benchmark: requests/s, time to first token, output tokens/s, KV memory.

    python -m scripts.serve_load runs/real/run --base runs/real/model --budgets all 64 32 --prompts 64 --at-once 16 --side 336

For each budget `visionzip serve` is started (for ``all``: vLLM on the base model, whose every token is read) with the same settings, and
``vllm bench serve`` sends requests with one random image each, all different. Prints a Markdown table; ``--out`` also gets the numbers as
JSON and a plot. Needs the environment of `make test-serve`, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.bad_input import exit_code_of
from visionzip.analysis import style
from visionzip.serving.launch import NO_DOMAIN, answers, server_module

SETTINGS = (
    "--max-model-len",
    "2048",
    "--max-num-seqs",
    "256",
    "--limit-mm-per-prompt",
    '{"image": 1}',
    "--enforce-eager",
)
BENCH = """
import argparse, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
CONCURRENCY = re.compile(r"KV cache size: ([\\d,]+) tokens")


@contextmanager
def served(arguments: argparse.Namespace, budget: str, log: Path) -> Iterator[str]:
    """The address of a server at `budget`.

    Raises:
        RuntimeError: it ended before it answered; with its last lines.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ("--host", "127.0.0.1", "--port", str(port), "--dtype", arguments.dtype)
    if budget == "all":
        module = ("-m", "visionzip.serving.vllm_main", *server_module(), arguments.base, "--model-impl", "transformers")
        command = [
            sys.executable,
            *module,
            "--served-model-name",
            "model",
            "--allowed-media-domains",
            NO_DOMAIN,
            *where,
        ]
    else:
        command = [
            sys.executable,
            "-m",
            "visionzip",
            "serve",
            arguments.model,
            "--budget",
            budget,
            "--name",
            "model",
            *where,
        ]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *SETTINGS], stdout=file, stderr=file, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
    try:
        address = f"http://127.0.0.1:{port}"
        while not answers(f"{address}/health"):
            if process.poll() is not None:
                raise RuntimeError(f"the server at budget {budget} ended:\n{log.read_text()[-2000:]}")
            time.sleep(1)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def measure(arguments: argparse.Namespace, address: str, folder: Path) -> dict[str, Any]:
    """``vllm bench serve`` on a server."""
    bucket = {(arguments.side, arguments.side, 1): 1.0}
    command = [
        *("--backend", "openai-chat", "--base-url", address, "--endpoint", "/v1/chat/completions"),
        *("--model", "model", "--tokenizer", arguments.base, "--dataset-name", "random-mm"),
        *("--random-mm-base-items-per-request", "1", "--random-mm-num-mm-items-range-ratio", "0"),
        *("--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}', "--random-mm-bucket-config", str(bucket)),
        *("--random-input-len", "16", "--random-output-len", str(arguments.tokens), "--ignore-eos"),
        *("--num-prompts", str(arguments.prompts), "--max-concurrency", str(arguments.at_once), "--seed", "0"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "result.json"),
    ]
    subprocess.run([sys.executable, "-c", BENCH, *command], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "result.json").read_text())


def row(arguments: argparse.Namespace, budget: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with served(arguments, budget, log) as address:
            found = measure(arguments, address, Path(folder))
        cache = CONCURRENCY.search(log.read_text())
    tokens = found["total_input_tokens"] / max(1, found["completed"])
    prompt = found.get("prompt_tokens") or tokens
    held = int(cache[1].replace(",", "")) if cache else 0
    return {
        "budget": budget,
        "completed": found["completed"],
        "requests/s": round(found["request_throughput"], 3),
        "first token, ms": round(found["mean_ttft_ms"]),
        "output tokens/s": round(found["output_throughput"], 1),
        "tokens in the KV cache": held,
        "prompt tokens": round(prompt),
    }


def render(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(
        [
            *lines,
            *(
                "| "
                + " | ".join(f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in names)
                + " |"
                for row in rows
            ),
        ]
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Requests/s of each budget."""
    with style.style():
        figure, axes = style.new_figure(5, 3)
        axes.bar([row["budget"] for row in rows], [row["requests/s"] for row in rows])
        axes.set_xlabel("visual tokens per image")
        axes.set_ylabel("requests/s")
        style.save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="anything `visionzip serve` takes")
    parser.add_argument("--base", required=True, help="the uncompressed model, for `all` and for its tokenizer")
    parser.add_argument("--budgets", nargs="+", default=["all", "64", "32"], help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=64, help="requests per budget (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=16, help="requests at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--side", type=int, default=336, help="pixels of the images (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder for load.json and load.png")
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        parser.error("vLLM is not installed here; `make test-serve` sets up .venv-serve, which has it")
    rows = [row(arguments, budget) for budget in arguments.budgets]
    print(render(rows))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "load.json").write_text(json.dumps(rows, indent=1))
        plot(rows, arguments.out / "load.png")


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
