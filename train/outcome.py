"""What a finished run leaves on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.nn import Parameter

from train import random_state, report
from train.config import RunConfig
from train.scores import Scores
from visionzip.export import FORMATS, Trained, save_projector
from visionzip.export.files import staged
from visionzip.fingerprint import gathered


def export(model: Any, processor: Any, config: RunConfig, metadata: dict[str, Any], write: bool) -> None:
    """`projector/` with what it belongs to; `adapter/` where LoRA was trained, `model/` where the LLM was. Collective.

    Args:
        write: on rank 0 alone.
    """
    folder = Path(config.output_dir)
    save_projector(model, folder / "projector", metadata, write=write)
    if config.train.lora is not None:
        trained = Trained.of(model, metadata)
        if write:
            with staged(folder / "adapter", overwrite=True) as out:
                FORMATS["peft"].write(trained, out)
    if "llm" in config.train.parts:
        save_whole(model, processor, folder / "model", write)


def save_whole(model: Any, processor: Any, out: Path, write: bool) -> None:
    """A model whose LLM was trained, as a directory for `from_pretrained`. Collective where the weights are sharded."""
    state = {}
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        with gathered([parameter] if isinstance(parameter, Parameter) else []):
            if write:
                state[name] = parameter.detach().to("cpu", copy=True)
    if write:
        model.save_pretrained(out, state_dict=state)
        processor.save_pretrained(out)


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
            pictures += report.kept_patches(folder, model, processor, config)
    return pictures
