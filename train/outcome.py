"""The results of a finished run: export, report, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from train import random_state, report
from train.callbacks import Wandb
from train.config import RunConfig
from train.ending import Exit, RunEnded
from train.finished import record_finish
from train.scores import Scores, describe_scores
from train.setup import Run, Tokens
from train.trainable import count_parameters, describe_trained
from train.trainer import ProjectorTrainer
from train.wandb_page import build_final_page
from visionzip.loading import save_result
from visionzip.projector import NotFinite


def leave_behind(
    run: Run, trainer: ProjectorTrainer, scores: dict[str, Scores], tokens: Tokens, wandb: Wandb | None
) -> None:
    """Export, report, tables. Collective."""
    facts = report.summarize_results(scores, *tokens, run.config.seed, count_parameters(run.model))
    metadata = {
        "results": {key: value for key, value in facts.items() if key not in ("by_type", "ran_on")},
        "data": [source.label for source in run.config.data.sources],
        "steps": trainer.state.global_step,
        "trained": describe_trained(run.config.train),
    }
    run.watchdog.beat("writing the results")
    result = export_result(run.model, run.processor, run.config, metadata, write=run.rank == 0)
    if run.rank == 0:
        images = write_report(run.model, run.processor, run.config, scores, facts, trainer.state.log_history)
        announce_result(run, result, scores, tokens, images, wandb)
        record_finish(run.config, trainer.state.global_step)
    if run.world_size > 1:
        dist.barrier()


def export_result(model: Any, processor: Any, config: RunConfig, metadata: dict[str, Any], write: bool) -> Path:
    """All that was trained, in one folder of the run's directory: `projector/`, or `adapter/` with the projector in it where
    LoRA was trained, or `model/` where the LLM was. Collective.

    Args:
        write: on rank 0 alone.

    Returns:
        That folder.

    Raises:
        RunEnded: on every rank, for weights that are not finite, which under ZeRO-3 rank 0 alone may see.
        OSError: on rank 0, for a disk that is full or can't be written.
    """
    form = "merged" if "llm" in config.train.parts else "peft" if config.train.lora is not None else "safetensors"
    folder, failed = Path(config.output_dir), None
    try:
        folder = save_result(model, config.output_dir, form, metadata, write=write)
    except NotFinite as error:  # found when all weights are gathered: the ranks are at the same point
        failed = str(error)
    if dist.is_initialized():
        told = [failed]
        dist.broadcast_object_list(told, src=0)
        failed = failed or told[0]
    if failed is not None:
        raise RunEnded(Exit.NOT_FINITE, f"{failed}. The last complete checkpoint is untouched")
    return folder


def write_report(
    model: Any,
    processor: Any,
    config: RunConfig,
    scores: dict[str, Scores],
    facts: dict[str, Any],
    log: list[dict[str, Any]],
) -> list[Path]:
    """`report/`; returns its figures. Kept patches need a whole model, so ZeRO-3 goes without them."""
    if not config.report.enabled:
        return []
    folder = Path(config.output_dir) / "report"
    images = report.write_report(folder, config, scores, facts, log)
    if config.eval is not None and not config.trainer.sharded:
        with random_state.preserve():
            images += report.draw_kept_patches(folder, model, processor, config, scores)
    return images


def announce_result(
    run: Run, result: Path, scores: dict[str, Scores], tokens: Tokens, images: list[Path], wandb: Wandb | None
) -> None:
    if scores:
        print(f"\n{describe_scores(scores, *tokens)}", flush=True)
    where = f"; report: {run.folder / 'report'}" if images else ""
    run.say(f"{result.name}: {result}{where}")
    if wandb:
        wandb.log({f"eval/{name}": found.accuracy for name, found in scores.items()})
        wandb.log_computed(lambda library: build_final_page(library, scores, *tokens))
        wandb.log_images({f"report/{path.stem}": path for path in images})
        wandb.finish()
