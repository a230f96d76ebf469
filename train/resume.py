"""Which checkpoint a run resumes from, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train import checkpoint
from train.ending import Exit, RunEnded


@dataclass
class Resume:
    """The checkpoint that a run resumes from, as every rank knows it. Only rank 0 can read the directory."""

    path: str
    progress: dict[str, Any]
    trainer_state: str
    reader: checkpoint.Reader | None = None


def find_resume(
    wanted: str | None, output_dir: str, rank: int, world_size: int, warn: Callable[[str], None]
) -> Resume | None:
    """The checkpoint that `trainer.resume` leads to; None for a start from the beginning. Rank 0 looks; the others are told.

    Raises:
        RunEnded: a checkpoint that was named explicitly is damaged or not there.
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
    checkpoint.remove_leftovers(output_dir)
    if wanted is None:
        return None
    if wanted == "auto":
        path = checkpoint.find_newest_complete(output_dir, warn)
        if path is None and checkpoint.list_checkpoints(output_dir):
            warn(f"no complete checkpoint is left in {output_dir}: starting from the beginning")
    else:
        path = Path(wanted)
    return checkpoint.Reader(path) if path is not None else None
