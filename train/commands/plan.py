"""say whether a run fits into the memory of its GPUs, under every ZeRO stage

  visionzip plan --config configs/llava-1.5-7b/ft-64.yaml --gpus 8 --gpu-memory 24

Sizes come from the model's config alone; no weights are read. If the model is not on this machine, a `model.json` (its
`config.json`) next to the run's config is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands import _config
from train.guard import run_guarded
from train.memory import TEXT, list_plans, measure_model, model_without_weights, render_plans
from visionzip.argument_types import at_least
from visionzip.words import count_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _config.add_arguments(parser)
    parser.add_argument("--gpus", type=at_least(1), default=8, help="number of GPUs (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=gibibytes, default=24.0, help="GiB of one GPU (default: %(default)s)")
    parser.add_argument(
        "--length", type=at_least(1), help=f"average tokens per sample (default: {TEXT} of text and an image's)"
    )


def gibibytes(text: str) -> float:
    """Raises argparse.ArgumentTypeError: not a number, or not greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number greater than 0 (found {text!r})")
    return value


def run(arguments: argparse.Namespace) -> int:
    return run_guarded(lambda: plan(arguments))


def plan(arguments: argparse.Namespace) -> int:
    config = _config.read_config(arguments)
    sizes = measure_model(model_without_weights(config, Path(arguments.config).parent), config)
    length = arguments.length or sizes.visual + TEXT
    print(
        f"{sizes.total / 1e9:.2f} billion parameters, {sizes.trained / 1e6:.1f} million train; {count_of(arguments.gpus, 'GPU')}; "
        f"{length} tokens per sample, {sizes.visual} of them visual\n"
        f"a checkpoint: {3 * 4 * sizes.trained / 1e6:.0f} MB (three float32 tensors a trained parameter; all weights in bf16 alone: "
        f"{2 * sizes.total / 1e9:.1f} GB)\n"
    )
    print(
        render_plans(
            list_plans(config), sizes, arguments.gpus, arguments.gpu_memory, length, "llm" in config.train.parts
        )
    )
    return 0
