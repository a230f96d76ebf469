"""Runs as separate processes, forked from one that has imported everything: they start at once, and a failure affects only one."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.config import RunConfig
from train.ending import Exit, exit_now
from train.guard import run_guarded

PRELOADED = (
    "torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto", "accelerate", "data.cache",
    "train.run",
)  # fmt: skip


@dataclass
class Task:
    """A task for a separate process; its output goes to `log`."""

    name: str
    action: Callable[[RunConfig], int]
    config: RunConfig
    log: Path


def run_all(tasks: Sequence[Task], jobs: int, tell: Callable[[Task, int, float], None]) -> int:
    """Run all tasks, `jobs` at a time, and continue if one fails; returns how many failed.

    Each is a process forked from one that has imported everything, so it starts at once, and dies alone. With several GPUs
    they take turns.

    Raises:
        KeyboardInterrupt: stopped by a signal; what was running has saved what it could by then.
    """
    import torch

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(PRELOADED))
    gpus = torch.cuda.device_count()
    waiting, failed = list(tasks)[::-1], 0
    running: dict[Any, tuple[Any, Task, int, float]] = {}
    free = list(range(jobs))
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        while waiting or running:
            while waiting and free:
                task, slot = waiting.pop(), free.pop(0)
                process = server.Process(target=perform, args=(task, slot % gpus if gpus > 1 else None))
                process.start()
                running[process.sentinel] = (process, task, slot, time.monotonic())
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, task, slot, since = running.pop(sentinel)
                process.join()
                free.append(slot)
                code = process.exitcode or 0
                failed += code != 0
                tell(task, code, time.monotonic() - since)
                if code == Exit.STOPPED:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return failed


def interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def perform(task: Task, gpu: int | None) -> None:
    """In a separate process: run the task, and exit with its code."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, which would not be released
    threading.Thread(target=end_with_parent, daemon=True).start()
    code = run_guarded(lambda: task.action(task.config))
    print(f"{time.process_time():.1f} s of CPU time", file=sys.stderr)
    exit_now(code)


def visible_gpu(gpu: int, visible: str | None) -> str:
    """``CUDA_VISIBLE_DEVICES`` that leaves the `gpu`-th of those that are visible now."""
    return visible.split(",")[gpu].strip() if visible else str(gpu)


def end_with_parent() -> None:
    """No cell goes on running after its sweep was killed: a second start would run it again at the same time."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
