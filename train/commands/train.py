"""fine-tune the projector of a compressed vision-language model

  visionzip train --config configs/tiny-llava/demo.yaml                                      one process
  visionzip train --config configs/llava-1.5-7b/ft-64.yaml --print-config                    the resolved config, and stop
  deepspeed train.py --config configs/llava-1.5-7b/ft-64.yaml trainer.learning_rate=1e-5     several GPUs (or CPU processes)
  torchrun --nproc_per_node 2 train.py --config ...                                          the same under torchrun

`python train.py` is `visionzip train`.
"""

from __future__ import annotations

import argparse

from train.commands import _config
from train.config import to_yaml
from train.config_help import describe_config
from train.ending import exit_now
from train.guard import run_guarded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _config.add_arguments(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher hands it over
    parser.epilog = describe_config()


def run(arguments: argparse.Namespace) -> int:
    """Ends the process after a run, whose threads and process group would keep it."""
    if arguments.print_config:
        return run_guarded(lambda: print(to_yaml(_config.read_config(arguments)), end="") or 0)
    exit_now(run_guarded(lambda: train(arguments)))
    return 0


def train(arguments: argparse.Namespace) -> int:
    config = _config.read_config(arguments)
    from train.run import run  # DeepSpeed and the rest take seconds: a mistake in the config is reported before

    return run(config)
