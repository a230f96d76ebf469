"""Parse → build → run."""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from train.config import ConfigError, RunConfig, describe, load_config, to_yaml
from train.ending import Exit, RunEnded, StopRequest, Watchdog, leave

logger = logging.getLogger(__name__)
STORAGE_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
_claimed: dict[Path, IO[str]] = {}  # by `claim`, as long as the process lives


def parse_arguments(arguments: Sequence[str] | None, program: str = "train.py", about: str = "") -> argparse.Namespace:
    from data import config as _  # noqa: F401

    parser = argparse.ArgumentParser(
        program,
        description=about or "Fine-tune the projector of a compressed vision-language model.",
        epilog="Every key can be set on the command line as section.key=value. Keys, types and defaults:\n\n"
        + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a YAML file; see configs/")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher hands it over
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="put over the file, e.g. trainer.learning_rate=1e-4"
    )
    return parser.parse_args(arguments)


def read_config(options: argparse.Namespace) -> RunConfig:
    return load_config(options.config, options.overrides)


def main(arguments: Sequence[str] | None = None) -> None:
    """What `train.py` does. Ends the process with one of `train.ending.Exit`."""
    options = parse_arguments(arguments)
    if options.print_config:
        raise SystemExit(run_guarded(lambda: print(to_yaml(read_config(options)), end="") or 0))
    leave(run_guarded(lambda: run(read_config(options))))


def run_guarded(action: Callable[[], int]) -> int:
    """Exit code of `action`; what goes wrong is said once, in a sentence where it is an expected kind of wrong."""
    rank = os.environ.get("RANK", "0")
    try:
        return action()
    except ConfigError as error:
        if rank == "0":
            print(f"config error: {error}", file=sys.stderr)
        return Exit.CONFIG
    except RunEnded as ended:
        print(f"\nrun ended with exit code {int(ended.code)}: {ended}", file=sys.stderr)
        return ended.code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            traceback.print_exc()
            return Exit.ERROR
        where = error.filename or "a file of this run"
        print(
            f"\nrun ended with exit code {int(Exit.STORAGE)}: {where} could not be written: {error.strerror}",
            file=sys.stderr,
        )
        return Exit.STORAGE
    except Exception as error:
        if lost_peer(error):
            # Another rank has already said what is wrong; let the launcher see that one's exit code first.
            said = next(iter(str(error).splitlines()), "")
            print(f"rank {rank}: lost the connection to another rank; ending too ({said})", file=sys.stderr, flush=True)
            time.sleep(5)
        else:
            print(f"rank {rank}: unexpected error", file=sys.stderr)
            traceback.print_exc()
        return Exit.ERROR


def lost_peer(error: BaseException) -> bool:
    """Whether gloo, NCCL or the store say that another rank is gone. NCCL's other errors (no memory, two ranks on one GPU, a driver
    that is too old) are this rank's own, though "NCCL" is in them too."""
    words = (
        "connection closed by peer",
        "connection closed by remote peer",
        "connection reset by peer",
        "connection refused",
        "broken pipe",
        "remote process exited",
        "communicator was aborted",
    )
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def run(config: RunConfig) -> int:
    """One training run, from the base model to the report."""
    from transformers import set_seed

    from train.arguments import training_arguments
    from train.build import build_model, master_precision
    from train.launch import check_world, join_deepspeed, prepare_environment, quiet
    from train.trainable import choose

    launched = prepare_environment()
    quiet(int(os.environ["RANK"]))
    stop = StopRequest().install()
    try:
        args = training_arguments(
            config.trainer,
            output_dir=config.output_dir,
            seed=config.seed,
            dtype=config.model.dtype,
            world_size=launched,
        )
    except ValueError as error:
        raise ConfigError(f"trainer: {error}") from error
    check_world(args.world_size, launched)
    if config.trainer.deepspeed != "off":
        join_deepspeed()
    make_output_dir(config, args.process_index)
    model, processor = build_model(config)
    set_seed(config.seed)  # adapters are drawn before the Trainer seeds; loading draws too, but not under every stage
    try:
        trains = choose(model, config.train)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.trainer.deepspeed == "off":
        master_precision(model)
    watchdog = Watchdog(config.trainer.hang_timeout, args.process_index).start()
    from train.program import Program

    program = Program(config, args, model, processor, trains, stop, watchdog)
    try:
        return program.run()
    finally:
        watchdog.stop()
        stop.remove()


def make_output_dir(config: RunConfig, rank: int) -> None:
    """Rank 0 makes sure, before anything else is done, that results can be written.

    Raises:
        RunEnded: when they can't.
    """
    if rank != 0:
        return
    try:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder)
        (folder / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise RunEnded(
            Exit.STORAGE, f"output_dir {config.output_dir} can't be written: {error.strerror or error}"
        ) from error


def claim(folder: Path) -> None:
    """Hold `folder` for this process as long as it lives: two runs in one would delete each other's checkpoints.

    A POSIX lock: killed processes lose it, forked ones (workers) don't inherit it. File systems without locks go unguarded.

    Raises:
        RunEnded: when another run holds it.
    """
    _claimed[folder] = file = open(folder / ".running", "a+")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RunEnded(
            Exit.CONFIG, f"another run is writing into {folder}; wait for its end, or set another output_dir"
        ) from error
    except OSError:
        logger.warning("%s is on a file system without locks: nothing stops a second run from writing into it", folder)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
