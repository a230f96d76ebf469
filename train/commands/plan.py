"""say whether a run fits into the memory of its GPUs, under every ZeRO stage, and how long it takes

  visionzip plan --config configs/llava-1.5-7b/ft-64.yaml --gpus 8 --gpu-memory 24
  visionzip plan --config configs/llava-1.5-7b/ft-64.yaml --tflops 400 --samples 66500
  visionzip plan --config configs/tiny-llava/demo.yaml --gpus 1 --tflops measure --samples 4000

Sizes come from the model's config alone; no weights are read. If the model is not on this machine, a `model.json` (its
`config.json`) next to the run's config is used. Time is counted work divided by --tflops: what a GPU achieves, not its peak.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.commands import _config
from train.duration import measure_rate, render_duration, sample_work
from train.guard import run_guarded
from train.memory import TEXT, list_plans, measure_model, model_without_weights, render_plans
from visionzip.argument_types import at_least
from visionzip.words import count_of

MEASURE = 0.0
"""Stands for ``--tflops measure``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _config.add_arguments(parser)
    parser.add_argument("--gpus", type=at_least(1), default=8, help="number of GPUs (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=gibibytes, default=24.0, help="GiB of one GPU (default: %(default)s)")
    parser.add_argument(
        "--tflops",
        type=tflops,
        help="TFLOP/s that a GPU achieves in training, or measure: those of one layer on this machine",
    )
    parser.add_argument("--samples", type=at_least(1), help="samples of an epoch, for the time of the whole run")
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


def tflops(text: str) -> float:
    """Raises argparse.ArgumentTypeError: neither that nor a number greater than 0."""
    return MEASURE if text == "measure" else gibibytes(text)


def run(arguments: argparse.Namespace) -> int:
    return run_guarded(lambda: plan(arguments))


def plan(arguments: argparse.Namespace) -> int:
    config = _config.read_config(arguments)
    model = model_without_weights(config, Path(arguments.config).parent)
    sizes = measure_model(model, config)
    length = arguments.length or sizes.visual + TEXT
    print(
        f"{sizes.total / 1e9:.2f} billion parameters, {sizes.trained / 1e6:.1f} million train; {count_of(arguments.gpus, 'GPU')}; "
        f"{length} tokens per sample, {sizes.visual} of them visual\n"
        f"a checkpoint: {3 * 4 * sizes.trained / 1e6:.0f} MB (three float32 tensors per trained parameter; all weights in bf16 alone: "
        f"{2 * sizes.total / 1e9:.1f} GB)\n"
    )
    print(
        render_plans(
            list_plans(config), sizes, arguments.gpus, arguments.gpu_memory, length, "llm" in config.train.parts
        )
    )
    if arguments.tflops is not None:
        rate = arguments.tflops * 1e12 or measure_rate(model, config, list_plans(config)[0].device, length)
        work = sample_work(model, config, sizes, length)
        print(f"\n{render_duration(work, rate, arguments.gpus, config, arguments.samples)}")
    return 0
