"""Which of several processes this is, and which GPU is its own: what torchrun, deepspeed and Slurm launchers say in the environment."""

from __future__ import annotations

import os

import torch


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, over all nodes; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device() -> torch.device:
    """This process's GPU, or the CPU where there is none.

    It is made the current one: what is not told where to go (kernels, quantised weights) goes there, and not to GPU 0 from
    every process of the node.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Some launchers let each process see its own GPU alone, whatever its number on the node.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
