"""ask the uncompressed model the training questions, for compressed runs to learn from

  visionzip teacher --config configs/tiny-llava/demo.yaml train.distill.cache=runs/demo/teacher
  torchrun --nproc_per_node 8 -m train.teacher --config ...                         a share of the records for each GPU

Every record goes through the untouched model once, with all its visual tokens and its whole conversation; of each supervised token
the `train.distill.top_k` likeliest words are kept. A run that learns from them asks for the same model, data layout and settings,
and leaves out a record whose image or answer has changed since. Interrupted, the same command goes on.
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
    config = _config.read(arguments)
    from data.processes import rank_and_world
    from train.launch import quiet
    from train.teacher_answers import ask_teacher

    quiet(rank_and_world()[0])
    return ask_teacher(config)
