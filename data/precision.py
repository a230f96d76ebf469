"""Whether bfloat16 is worth choosing here: does the processor multiply it, and does oneDNN's kernel for it live?

Some virtual machines advertise AMX (``amx_bf16``) and kill the process that uses it with SIGILL. oneDNN then has to be told to leave it
alone, by ``ONEDNN_MAX_CPU_ISA``, which it reads at its first product.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import torch

WITHOUT_AMX = "AVX512_CORE_BF16"
"""The value of ``ONEDNN_MAX_CPU_ISA`` for bfloat16 without AMX: about a tenth of the speed of AMX where both work."""
_ISA = "ONEDNN_MAX_CPU_ISA"
_LONGEST = 20
"""Seconds for one small product in a child process."""


@functools.cache
def suitable_dtype() -> str:
    """What ``model.dtype: auto`` stands for: ``"bfloat16"`` on a GPU and on a CPU whose products of it were seen to work, else
    ``"float32"``. Sets ``ONEDNN_MAX_CPU_ISA`` for this process and its children where bfloat16 needs it."""
    if torch.cuda.is_available():
        return "bfloat16"
    if not multiplies_bfloat16():
        return "float32"
    if survives_bfloat16():
        return "bfloat16"
    if _ISA not in os.environ and survives_bfloat16(WITHOUT_AMX):
        os.environ[_ISA] = WITHOUT_AMX
        return "bfloat16"
    return "float32"


def multiplies_bfloat16(cpuinfo: str | Path = "/proc/cpuinfo") -> bool:
    """The processor has instructions for products of bfloat16; without them it is many times slower than float32."""
    try:
        lines = Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def survives_bfloat16(isa: str | None = None) -> bool:
    """Whether a child process lives through a product of bfloat16 matrices, with ``ONEDNN_MAX_CPU_ISA`` set to `isa` unless None.

    Right only before this process has multiplied anything: oneDNN chooses its kernels once.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # The child runs one thread and ends without Python's clean-up, so that no lock of another thread is waited for.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_LONGEST)
            if isa is not None:
                os.environ[_ISA] = isa
            _multiply()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _multiply() -> None:
    torch.set_num_threads(1)
    ones = torch.ones(128, 128, dtype=torch.bfloat16)
    assert float((ones @ ones)[0, 0]) == 128
