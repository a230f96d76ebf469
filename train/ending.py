"""How a run ends: exit codes, the exception that carries one, signals that ask for a stop, the watchdog that ends a hang.

Every rank runs this code. A rank that fails says why and leaves; the others are ended by their launcher, by the broken
connection, or, where both are silent, by their own watchdog after `trainer.hang_timeout` seconds.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType

STARTING = "starting"
START_TIMEOUT = (
    1800.0  # compiling DeepSpeed's extensions and sharding large weights take minutes, without any sign of life
)


class Exit(IntEnum):
    """Exit codes of a rank; close to sysexits.h, so that a job script can tell "run me again" from "look at me"."""

    DONE = 0
    ERROR = 1
    CONFIG = 2
    DATA = 65
    NOT_FINITE = 70
    HANG = 71
    STORAGE = 74
    STOPPED = 75  # saved after SIGTERM or SIGUSR1: start the same command again


class RunEnded(Exception):
    """Ends every rank with one message and an exit code."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or a first SIGINT. Ranks agree on it once a step, then save and leave together."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[int, object] = {}

    def install(self) -> StopRequest:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt  # asked twice at a terminal: now
        self.signal = self.signal or signal.Signals(number).name


class Watchdog:
    """Ends this process when nothing has happened for `timeout` seconds.

    A thread of its own, so that it still runs while the main one waits in a collective for a rank that is gone or stuck.
    Each rank has one: when one rank hangs all of them stop making progress, and all end within the same time.
    """

    def __init__(self, timeout: float, rank: int, end: Callable[[int], None] = os._exit) -> None:
        self.timeout, self.rank, self._end = timeout, rank, end
        self._last, self._doing = time.monotonic(), STARTING
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        self.beat(STARTING)
        self._thread.start()
        return self

    def beat(self, doing: str) -> None:
        """Called wherever something was achieved; `doing` is what the message will name."""
        self._last, self._doing = time.monotonic(), doing

    def stop(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.timeout / 4)):
            limit = max(self.timeout, START_TIMEOUT) if self._doing is STARTING else self.timeout
            if time.monotonic() - self._last > limit:
                print(
                    f"\nrank {self.rank}: no progress for {limit:.0f} s while {self._doing}; this or another rank hangs."
                    f" Ending with exit code {int(Exit.HANG)}; the last complete checkpoint is untouched"
                    " (trainer.hang_timeout sets the time).",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
                self._end(Exit.HANG)
                return


def exit_now(code: int) -> None:
    """Exit now. `sys.exit` would wait for the process group and for threads of a peer that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
