"""compute the uncompressed model's answers to the training questions, for distillation

  visionzip teacher --config configs/tiny-llava/demo.yaml train.distill.cache=runs/demo/teacher
  torchrun --nproc_per_node 8 -m train.teacher --config ...                         records shared among the GPUs

Every record goes through the uncompressed model once, with all visual tokens and the whole conversation; for each supervised token
the `train.distill.top_k` likeliest tokens are stored. A run that uses them must have the same model, data layout and settings,
and rejects records whose image or answer has changed since. The same command continues an interrupted run.
"""

from __future__ import annotations

import argparse

from train.commands import _config
from train.guard import run_guarded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _config.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    return run_guarded(lambda: teach(arguments))


def teach(arguments: argparse.Namespace) -> int:
    config = _config.read_config(arguments)
    from data.processes import rank_and_world
    from train.launch import silence_rank
    from train.teacher_answers import ask_teacher

    silence_rank(rank_and_world()[0])
    return ask_teacher(config)
