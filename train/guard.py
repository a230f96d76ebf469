"""Exit codes for every kind of ending: every command of the program runs inside `run_guarded`."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

from data.storage import storage_message
from train.config import ConfigError
from train.ending import Exit, RunEnded


def run_guarded(action: Callable[[], int]) -> int:
    """Exit code of `action`; an error is reported once, in one sentence if the error is an expected one."""
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
    except Exception as error:
        if message := storage_message(error):
            print(f"\n{message}", file=sys.stderr)
            return Exit.STORAGE
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
