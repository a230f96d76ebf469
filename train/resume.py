"""Which checkpoint a run goes on from, and whether it is this run's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train import checkpoint
from train.ending import Exit, RunEnded


@dataclass
class Resume:
    """The checkpoint that a run goes on from, as every rank knows it. Only rank 0 can read the directory."""

    path: str
    progress: dict[str, Any]
    trainer_state: str
    reader: checkpoint.Reader | None = None


def find_resume(
    wanted: str | None, output_dir: str, rank: int, world_size: int, warn: Callable[[str], None]
) -> Resume | None:
    """What `trainer.resume` leads to, the same on every rank. Rank 0 looks; the others are told.

    Raises:
        RunEnded: a checkpoint that was named explicitly is damaged.
    """
    answer: list[Any] = [None]
    reader = None
    if rank == 0:
        try:
            reader = _open(wanted, output_dir, warn)
            if reader is not None:
                answer[0] = Resume(str(reader.path), reader.progress, reader.trainer_state)
        except (checkpoint.CheckpointError, OSError) as error:
            answer[0] = RunEnded(Exit.STORAGE, f"trainer.resume={wanted}: {error}")
    if world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], RunEnded):
        raise answer[0]
    if answer[0] is not None and rank == 0:
        answer[0].reader = reader
    return answer[0]


def _open(wanted: str | None, output_dir: str, warn: Callable[[str], None]) -> checkpoint.Reader | None:
    if wanted is None:
        return None
    if wanted == "auto":
        checkpoint.remove_leftovers(output_dir)
        path = checkpoint.find_newest_complete(output_dir, warn)
    else:
        path = Path(wanted)
    return checkpoint.Reader(path) if path is not None else None


def agree(resume: Resume, identity: dict[str, Any], exact: dict[str, Any]) -> list[str]:
    """Compare a checkpoint with the run that wants to go on from it.

    Args:
        identity: must be equal (base model, ZipConfig, what trains).
        exact: may differ, but then the continuation is not bit for bit the run that was interrupted.

    Returns:
        A line for everything that can't be kept exact.

    Raises:
        RunEnded: when an entry of `identity` differs.
    """
    stored = resume.progress["identity"]
    different = [key for key, value in identity.items() if json.loads(json.dumps(value)) != stored.get(key)]
    if different:
        lines = "; ".join(
            f"{key}: {shorten(stored.get(key))} there, {shorten(identity[key])} here" for key in different
        )
        raise RunEnded(
            Exit.CONFIG,
            f"{resume.path} belongs to another run ({lines}). Set another output_dir, or trainer.resume=null to start anew",
        )
    before = {**resume.progress, **stored}
    return [
        f"{key} was {shorten(before.get(key))}, is {shorten(value)}"
        for key, value in exact.items()
        if before.get(key) != json.loads(json.dumps(value))
    ]


def shorten(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
