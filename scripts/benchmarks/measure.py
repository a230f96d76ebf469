"""Timing: variants run alternately in one process, so that a busy or a throttled machine slows all of them alike."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# Dense tensor-core peak of a device, FLOP/s, from the makers' data sheets: what a utilisation is a share of.
PEAK_BF16 = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
    "L40S": 362e12, "A10": 125e12, "4090": 165e12,
}  # fmt: skip


@dataclass
class Timing:
    """Seconds of every round, and the most memory a round took on top of what was there before, in bytes.

    `cpu_seconds` is this process's own time on the processor: what other programs take does not count there.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu_seconds)


def alternate(
    variants: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    until: float | None = None,
) -> dict[str, Timing]:
    """Run all variants in turn, `rounds` times after `warmup` untimed ones; the order is reversed every other round.

    After `until`, a time of `time.perf_counter`, no further round is begun once there is a timed one.
    """
    timings = {name: Timing() for name in variants}
    for number in range(warmup + rounds):
        if until is not None and number > warmup and time.perf_counter() > until:
            break
        order = list(variants) if number % 2 == 0 else list(reversed(variants))
        for name in order:
            if number < warmup:
                give_back()
            seconds, cpu, peak = timed(variants[name], device)
            if number >= warmup:
                timings[name].seconds.append(seconds)
                timings[name].cpu_seconds.append(cpu)
            timings[name].peak_bytes = max(timings[name].peak_bytes, peak)
    return timings


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float, int]:
    """Seconds of one call, this process's CPU seconds, and the memory it took at its peak on top of what was allocated before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        start, cpu = time.perf_counter(), time.process_time()
        run()
        torch.cuda.synchronize(device)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return seconds, cpu, torch.cuda.max_memory_allocated(device) - before
    with ResidentPeak() as resident:
        start, cpu = time.perf_counter(), time.process_time()
        run()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return seconds, cpu, resident.peak


def give_back() -> None:
    """Free memory goes back to the system, so that what is taken next shows as growth. glibc only; takes time, so for untimed rounds."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


class ResidentPeak:
    """Growth of this process's resident memory, looked at every 10 ms: a CPU has no allocator to ask."""

    def __enter__(self) -> ResidentPeak:
        self._before = self._most = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        return self._most - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, resident_bytes())


def resident_bytes() -> int:
    """0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s the hardware could do, and where the number is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((flops for key, flops in PEAK_BF16.items() if key in name), None)
        if known is not None and dtype in (torch.bfloat16, torch.float16):
            return known, f"data sheet of {name}, dense"
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, dtype=dtype, device=device)
    times = [timed(lambda: a @ a, device) for _ in range(8)]
    if device.type == "cuda":
        seconds = min(wall for wall, _, _ in times)
    else:  # what other programs take is no lesser peak
        seconds = min(cpu for _, cpu, _ in times) / torch.get_num_threads()
    return 2 * size**3 / seconds, f"measured, {size}x{size} matrix product"


def environment(device: torch.device) -> dict[str, Any]:
    """What a number has to be read with."""
    import transformers

    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        facts["load_before"] = round(os.getloadavg()[0], 2)
    return facts


def table(headers: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table, columns aligned for a terminal."""
    cells = [[str(value) for value in row] for row in [headers, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
