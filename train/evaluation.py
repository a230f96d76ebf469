"""The three evaluations of a run: full tokens and training-free before it trains, fine-tuned afterwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.config_file import config_errors
from data.records import content_digest
from train.cached import check_cache
from train.callbacks import replace_text
from train.config import RunConfig
from train.digest import describe_processor, digest
from train.held_out import score_at_budgets, score_model, tokens_per_image
from train.result_checks import check_answers
from train.scores import Scores
from train.setup import Run
from visionzip import attach, detach
from visionzip.attach import unwrap
from visionzip.families import family_for
from visionzip.families.base import dtype_of
from visionzip.intercept import Interceptions
from visionzip.words import count_of

QUESTIONS = {"template", "max_length", "max_pixels", "pad_images", "frames", "subset_seed"}
"""Keys of `data` that say how held-out questions are made, too."""


def count_tokens(run: Run) -> tuple[int, int]:
    """Visual tokens of a held-out image: (compressed, full); 0 where nothing is evaluated. Looks whether it can be asked at all.

    Raises:
        ConfigError: no held-out questions there, or a cache made with something else.
    """
    section = run.config.eval
    if section is None:
        return 0, 0
    with config_errors("eval"):
        if section.cache is not None:
            check_cache(run.config, run.model, run.processor, section.cache)
        return tokens_per_image(run.model, run.processor, run.config)


def evaluate_base(run: Run, base: dict[str, str]) -> dict[str, Scores]:
    """Full tokens and training-free, with the base model whole in memory; once for a run and all its resumes.

    Args:
        base: the base model's fingerprint. Scores of another one are not taken up.
    """
    config = run.config
    if config.eval is None:
        return {}
    known, key = run.folder / "base_scores.json", key_of_scores(config, run.processor, base)
    stored: list[Any] = [read_scores(known, key) if run.rank == 0 else None]
    if run.world_size > 1:
        dist.broadcast_object_list(stored, src=0)
    if stored[0] is not None:
        return stored[0]
    scores = {}
    if "training_free" in config.eval.compare:
        scores["training_free"] = evaluate(run, "training-free")
    if "full" in config.eval.compare:
        detach(run.model)
        with projectors_in_their_dtype(run.model):
            scores["full"] = evaluate(run, "full tokens")
        attach(run.model, run.processor, config.zip)
    if run.rank == 0:
        measured = json.loads(json.dumps({name: asdict(found) for name, found in scores.items()}))
        replace_text(known, json.dumps({"key": key, "digest": digest(measured), "scores": measured}))
    return scores


@contextmanager
def projectors_in_their_dtype(model: Any) -> Iterator[None]:
    """Inside, projectors take features of the encoder's dtype, whatever their own: what trains is float32 beside frozen weights in
    bfloat16, and a model that is not attached hands the features on as they are. (The LLM's embeddings are joined with a cast.)"""
    base = unwrap(model)

    def own(module: Any, value: Any) -> Any:
        floating = torch.is_tensor(value) and value.is_floating_point()
        return value.to(dtype_of(module, value.dtype)) if floating else value

    def cast(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(own(module, value) for value in args), {name: own(module, value) for name, value in kwargs.items()}

    with Interceptions() as put:
        for name in family_for(base).projectors:
            put.before_forward(base.get_submodule(name), cast)
        yield


def key_of_scores(config: RunConfig, processor: Any, base: dict[str, str]) -> str:
    """Changes when anything does that the untrained model's answers depend on."""
    assert config.eval is not None
    return digest(
        [
            config.eval.model_dump(),
            content_digest(config.eval.sources, config.data.cache_dir),
            config.data.model_dump(include=QUESTIONS),
            config.model.model_dump(),
            config.zip.model_dump(),
            describe_processor(processor),
            base,
        ]
    )


def evaluate_at_budgets(run: Run) -> dict[str, Scores]:
    """The fine-tuned model under each of `eval.budgets`. Collective."""
    assert run.config.eval is not None
    return score_at_budgets(
        run.model,
        "fine_tuned",
        run.config.eval.budgets,
        lambda budget: evaluate(run, f"fine-tuned, {budget}"),
    )


def evaluate(run: Run, what: str) -> Scores:
    """The model as it is now on all held-out questions, with a progress bar. Collective."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def show(done: int, of: int) -> None:
        if not bars:
            bars.append(tqdm(total=of, desc=f"asking ({what})", unit="batch", disable=run.rank != 0, file=sys.stderr,
                             dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 5.0))  # fmt: skip
        bars[0].update(done - bars[0].n)

    scores = score_model(
        run.model, run.processor, run.config, rank=run.rank, world_size=run.world_size,
        beat=run.watchdog.beat, bar=show,
    )  # fmt: skip
    for bar in bars:
        bar.close()
    if scores.unread:
        run.say(f"{count_of(scores.unread, 'held-out question')} not counted: could not be read")
    if warning := check_answers(what, scores):
        run.say(warning)
    return scores


def read_scores(path: Path, key: str) -> dict[str, Scores] | None:
    """What `evaluate_base` left in `path` under this key; None where it is not there, or damaged."""
    try:
        stored = json.loads(path.read_text())
        if stored["key"] != key or stored["digest"] != digest(stored["scores"]):
            return None
        return {
            name: Scores({k: (v[0], v[1]) for k, v in s["types"].items()}, s["answers"], s["unread"])
            for name, s in stored["scores"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
