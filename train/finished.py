"""Whether a run is finished: trained to its end, and all of its results are in place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.records import content_digest
from train.checkpoint import list_checkpoints, step_of, write_through
from train.config import RunConfig
from train.digest import digest
from visionzip.loading import RESULTS
from visionzip.manifest import list_files

RECORD = "finished.json"


def record_finish(config: RunConfig, step: int) -> None:
    """Write down that everything is there; the last thing a run does. On rank 0."""
    folder = Path(config.output_dir)
    content = {"step": step, "run": key_of(config), "files": list_results(folder)}
    aside = folder / f".{RECORD}"
    write_through(aside, json.dumps({**content, "digest": digest(content)}, indent=1).encode())
    os.replace(aside, folder / RECORD)


def find_finish(config: RunConfig, rank: int, world_size: int) -> int | None:
    """The last step, where the same command was run to its end before and nothing is missing; else None. Collective.

    A run that starts from the beginning, or from a checkpoint that was named, is never finished, nor is one without a checkpoint of its last step.
    """
    found: list[Any] = [_find(config) if rank == 0 and config.trainer.resume == "auto" else None]
    if world_size > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _find(config: RunConfig) -> int | None:
    folder = Path(config.output_dir)
    try:
        stored = json.loads((folder / RECORD).read_bytes())
        claimed = stored.pop("digest")
        saved = list_checkpoints(folder)
        if claimed != digest(stored) or not saved or step_of(saved[-1]) != stored["step"]:
            return None
        complete = stored["run"] == key_of(config) and stored["files"] == list_results(folder)
        return stored["step"] if complete else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def key_of(config: RunConfig) -> str:
    """Changes when the config or the records that it leads to do."""
    sources = [*config.data.sources, *(config.eval.sources if config.eval else [])]
    return digest([config.model_dump(mode="json"), content_digest(sources, config.data.cache_dir)])


def list_results(folder: Path) -> dict[str, dict[str, Any]]:
    """File of the exports and the report → its size and SHA-256."""
    paths = sorted(
        path for name in (*RESULTS.values(), "report") for path in (folder / name).rglob("*") if path.is_file()
    )
    return list_files(folder, [str(path.relative_to(folder)) for path in paths])
