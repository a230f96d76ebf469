"""What a finished run leaves on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train import random_state, report
from train.config import RunConfig
from train.scores import Scores
from visionzip.loading import save_result


def export(model: Any, processor: Any, config: RunConfig, metadata: dict[str, Any], write: bool) -> Path:
    """All that was trained, in one folder of the run's directory: `projector/`, or `adapter/` with the projector in it where
    LoRA was trained, or `model/` where the LLM was. Collective.

    Args:
        write: on rank 0 alone.

    Returns:
        That folder.
    """
    form = "merged" if "llm" in config.train.parts else "peft" if config.train.lora is not None else "safetensors"
    return save_result(model, config.output_dir, form, metadata, write=write)


def write_report(
    model: Any,
    processor: Any,
    config: RunConfig,
    scores: dict[str, Scores],
    facts: dict[str, Any],
    log: list[dict[str, Any]],
) -> list[Path]:
    """`report/`; returns its pictures. Kept patches need a whole model, so ZeRO-3 goes without them."""
    if not config.report.enabled:
        return []
    folder = Path(config.output_dir) / "report"
    pictures = report.write(folder, config, scores, facts, log)
    if config.eval is not None and not config.trainer.sharded:
        with random_state.untouched():
            pictures += report.kept_patches(folder, model, processor, config, scores)
    return pictures
