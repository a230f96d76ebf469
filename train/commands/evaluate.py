"""compare full tokens, training-free compression and a fine-tuned projector on held-out questions

  visionzip evaluate --config configs/tiny-llava/demo.yaml model.projector=runs/demo/projector
  torchrun --nproc_per_node 8 -m train.evaluate --config ... model.projector=...                    a share of them for each GPU

One table by question type. Without `model.projector`, full tokens and training-free compression are compared.
"""

from __future__ import annotations

import argparse
import json

from train.commands import _config
from train.guard import run_guarded
from train.scores import describe_scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _config.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    return run_guarded(lambda: evaluate(arguments))


def evaluate(arguments: argparse.Namespace) -> int:
    config = _config.read_config(arguments)
    import torch

    from train.compare import compare_models
    from train.launch import join_gloo, silence_rank

    rank, world_size = join_gloo()
    silence_rank(rank)
    results, tokens = compare_models(config, rank, world_size)
    if rank == 0:
        print(describe_scores(results, *tokens))
        print(json.dumps({name: round(scores.accuracy, 4) for name, scores in results.items()}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0
