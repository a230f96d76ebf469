"""A process that has imported everything once and forks ranks of `train.py` from then on.

Importing torch, transformers and DeepSpeed takes seconds, a run of these tests a fraction of one; tests that start dozens of runs
would do little else than import. Each rank is a process of its own with the environment a launcher gives it; signals, exit
codes and kills are real. Speaks JSON lines: a request `{"configs": [...], "world": 2, "env": {...}, "log": path}` is answered by
`{"pids": [...]}` and, when all have ended, `{"codes": [...]}`. A rank that fails ends the others, as launchers do.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
# Everything a run imports that takes more than a moment (DeepSpeed's Muon brings torch's compiler).
IMPORTS = (
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3", "deepspeed.ops.adam", "accelerate", "peft",
    "matplotlib.pyplot", "wandb", "transformers.models.auto.processing_auto", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.image_processing_auto", "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava", "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_pil_clip", "transformers.models.llama.modeling_llama",
    "data.dataset", "train.run", "train.trainer", "omegaconf.grammar_parser", "deepspeed.module_inject.auto_ep_config",
    "torch.utils.cpp_extension", "data.formats.llava", "train.losses.cross_entropy", "train.metrics.exact_match",
)  # fmt: skip
GRACE = 8.0  # seconds the others get after one rank failed


def rank(request: dict[str, Any], number: int, port: int) -> None:
    """Becomes one rank: never returns."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    local = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": request["world"], "LOCAL_WORLD_SIZE": request["world"]}
    if request["world"] > 1 or request.get("launched", True):
        os.environ.update(
            {**{k: str(v) for k, v in local.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        )
    os.environ.update(request.get("env", {}))
    if request.get("file_limit"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
    if request.get("slow_writes"):
        from train import checkpoint

        quick = checkpoint.write_through

        def slow(path: Path, content: bytes) -> None:
            time.sleep(request["slow_writes"])
            quick(path, content)

        checkpoint.write_through = slow
    if request.get("bad_gradient"):
        from train import trainer

        good = trainer.summed_loss
        calls = iter(range(10**6))

        def bad(*given: Any, **named: Any) -> Any:
            """A finite loss whose gradient is NaN, but for the first of them."""
            loss = good(*given, **named)
            return loss if next(calls) < request["bad_gradient"] else loss + (loss * 0).sqrt()

        trainer.summed_loss = bad
    if request.get("killed_before_export"):
        from train import outcome

        outcome.export_result = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
    from train import callbacks
    from train.config import load_config
    from train.guard import run_guarded
    from train.run import run

    callbacks.FINISH_TIMEOUT = request.get("wandb_finish", callbacks.FINISH_TIMEOUT)
    code = 1
    try:
        for config in request["configs"]:
            code = run_guarded(lambda path=config: run(load_config(path)))  # type: ignore[misc]
            if code:
                break
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(request: dict[str, Any]) -> None:
    from train.launch import free_port

    port = free_port()
    pids = []
    for number in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            rank(request, number, port)
        pids.append(pid)
    answer({"pids": pids})
    codes: dict[int, int] = {}
    failed: float | None = None
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] != 0 and failed is None:
                failed = time.monotonic()
            continue
        if failed is not None and time.monotonic() - failed > request.get("grace", GRACE):
            for left in set(pids) - codes.keys():
                os.kill(left, signal.SIGKILL)
        time.sleep(0.02)
    answer({"codes": [codes[pid] for pid in pids]})


def answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def import_registered() -> None:
    """The files of the registries that a run reads: asking for the names imports them."""
    from visionzip.encoders import ENCODERS
    from visionzip.export import FORMATS
    from visionzip.families import FAMILIES
    from visionzip.merges import MERGES
    from visionzip.selectors import SELECTORS

    for registry in (ENCODERS, FORMATS, FAMILIES, MERGES, SELECTORS):
        registry.names()


def main() -> None:
    for module in IMPORTS:
        importlib.import_module(module)
    import_registered()
    # Each run collects garbage; without this a rank would go through all that was imported, and copy those pages.
    gc.collect()
    gc.freeze()
    answer({"ready": os.getpid()})
    for line in sys.stdin:
        serve(json.loads(line))
    os._exit(0)  # tearing all these libraries down takes as long as they took to import


if __name__ == "__main__":
    main()
