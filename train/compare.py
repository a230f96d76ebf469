"""Full tokens, training-free compression and a fine-tuned model on the same held-out questions, outside of a run."""

from __future__ import annotations

from contextlib import ExitStack

from data.config_file import config_errors
from data.processes import own_device
from train.build import build_model
from train.config import ConfigError, RunConfig
from train.held_out import score_at_budgets, score_model, tokens_per_image
from train.scores import Scores
from visionzip import detach
from visionzip.export import loaded_into


def compare_models(config: RunConfig, rank: int = 0, world_size: int = 1) -> tuple[dict[str, Scores], tuple[int, int]]:
    """Scores by model, and the visual tokens of an image (compressed, full). Collective.

    The fine-tuned model is the one that `model.projector` names; without it the other two are compared.

    Raises:
        ConfigError: no model, no projector, or no held-out questions there.
    """
    start = config.model.projector
    base = config.model_copy(update={"model": config.model.model_copy(update={"projector": None})})
    model, processor = build_model(base)
    model.to(own_device())
    with config_errors("eval"):
        tokens = tokens_per_image(model, processor, config)
    assert config.eval is not None

    def ask(budget: str) -> Scores:
        return score_model(model, processor, config, rank=rank, world_size=world_size)

    results: dict[str, Scores] = {}
    if start is not None:  # first: a projector that can't be loaded ends it before anything is asked
        with ExitStack() as loaded:
            try:
                loaded.enter_context(loaded_into(model, start, force=config.model.force_projector))
            except (ValueError, OSError, ImportError) as error:
                raise ConfigError(f"model.projector: {error}") from error
            results["fine_tuned"] = score_model(model, processor, config, rank=rank, world_size=world_size)
            results |= score_at_budgets(model, "fine_tuned", config.eval.budgets, ask)
    results["training_free"] = score_model(model, processor, config, rank=rank, world_size=world_size)
    if start is None:
        results |= score_at_budgets(model, "training_free", config.eval.budgets, ask)
    detach(model)
    results["full"] = score_model(model, processor, config, rank=rank, world_size=world_size)
    return results, tokens
