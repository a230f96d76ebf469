"""What has to be true of the process before `TrainingArguments` is built, whichever way it was started."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import socket
import warnings
from collections.abc import Iterator

import torch

from train.extensions import prepare_extensions


def prepare_environment() -> int:
    """Complete the environment for one process without a launcher; returns the number of processes.

    DeepSpeed looks for MPI where RANK and its like are missing, even with one process.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked data workers do not mix
    prepare_extensions()
    return int(os.environ["WORLD_SIZE"])


def free_port() -> int:
    """A free TCP port, of those below what the kernel gives to outgoing connections (32768 and up on Linux): one
    of these could be taken between here and the moment it is listened on.

    Raises:
        OSError: when a hundred of them are all taken.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError("no free TCP port from 20000 to 31999")


def join_deepspeed() -> None:
    """Tell DeepSpeed of the process group that exists. Otherwise ZeRO-3 counts one process while it shards the weights on loading."""
    import deepspeed

    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        with without_deepspeed_output():
            deepspeed.init_distributed(
                dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
            )


@contextlib.contextmanager
def without_deepspeed_output() -> Iterator[None]:
    """Drop what Python code prints in this block: on every rank DeepSpeed (0.19.8) announces the extensions that it has built,
    with `print`, before a mistake in the config can be reported. Errors are raised, and warnings go to stderr, as always."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def join_gloo() -> tuple[int, int]:
    """Join the processes that were started together, for what needs no GPU to be sent; returns (rank, processes)."""
    world_size = prepare_environment()
    if world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")  # what is gathered are answers, which lie in memory
    return (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0), world_size


def silence_rank(rank: int) -> None:
    """One voice: libraries speak from rank 0 and only when something is wrong."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    for name in ("DeepSpeed", "deepspeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    for name in ("httpx", "wandb", "PIL", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_world(seen: int, launched: int) -> None:
    """Every rank must see its own share of the data.

    Raises:
        RuntimeError: when the libraries believe in another number of processes than the launcher started; all of them
            would then train on the same data and save as rank 0, and nothing would look wrong.
    """
    if seen != launched:
        raise RuntimeError(
            f"the launcher started {launched} processes but the trainer sees {seen}: each would train alone on the same data. "
            "Start with deepspeed, torchrun or plain python, and leave trainer.use_cpu to the program"
        )
