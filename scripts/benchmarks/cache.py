"""The token cache: how fast it is written and read, by how many workers, and what it takes of disk and memory."""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from transformers import CLIPImageProcessor

from data.cache.shards import Writer, key_of
from data.cache.store import Store
from data.sample import Media, Sample
from scripts.benchmarks import measure
from scripts.benchmarks.presets import PRESETS, Preset

GB = 1e9


def run(name: str, entries: int, workers: list[int], seconds: float = 1.0, folder: str | None = None) -> dict[str, Any]:
    """Entries of the preset's size in bfloat16. What is read comes from the page cache: a disk's own speed is another matter."""
    preset = PRESETS[name]
    size = preset.kept * preset.vision["hidden_size"] * 2
    with tempfile.TemporaryDirectory(dir=folder) as place:
        start = time.perf_counter()
        write(Path(place), preset, entries)
        written = time.perf_counter() - start
        start = time.perf_counter()
        store = Store(place)
        indexed = time.perf_counter() - start
        start = time.perf_counter()
        Store(place)
        opened = time.perf_counter() - start
        disk = sum(path.stat().st_size for path in Path(place).glob("*.tokens"))
        reads = [read(place, entries, count, seconds) for count in workers]
        return {
            "preset": name, "entries": len(store), "entry_bytes": size, "disk_bytes": disk, "overhead": disk / (size * entries) - 1,
            "write_seconds": written, "write_entries_per_second": entries / written, "index_seconds": indexed, "open_seconds": opened,
            "index_bytes": sum(path.stat().st_size for path in Path(place).glob("index-*")), "reads": reads,
            "pixels_per_core_second": pixels_a_second(preset),
            "bytes_of_66500": 66_500 * size,
        }  # fmt: skip


def write(place: Path, preset: Preset, entries: int) -> None:
    torch.manual_seed(0)
    pool = torch.randn(8, preset.kept, preset.vision["hidden_size"]).bfloat16()
    writer = Writer(place)
    for number in range(entries):
        writer.add(key_of(str(number).encode()), {"pictures": [[""]]}, {"0/": pool[number % 8]})
        writer.name(key_of(b"name", str(number).encode()), key_of(str(number).encode()), 1, 1)
    writer.close()


def read(place: str, entries: int, workers: int, seconds: float) -> dict[str, Any]:
    """Random access by so many processes at once; each has the store open for itself."""
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    ready = context.Barrier(workers)
    running = [
        context.Process(target=_reader, args=(place, entries, number, seconds, ready, results))
        for number in range(workers)
    ]
    for process in running:
        process.start()
    found = [results.get(timeout=120) for _ in running]
    for process in running:
        process.join()
    return {
        "workers": workers,
        "entries_per_second": sum(rate for rate, _ in found),
        "own_bytes_a_worker": max(memory for _, memory in found),
    }


def _reader(place: str, entries: int, seed: int, seconds: float, ready: Any, results: Any) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    ready.wait()
    before = private_bytes()
    store = Store(place)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(20):
            assert store.get(key_of(str(draw.randrange(entries)).encode())) is not None
        done += 20
    results.put((done / (time.perf_counter() - start), private_bytes() - before))


def pixels_a_second(preset: Preset, pictures: int = 32) -> float:
    """What the cache spares: 640×480 JPEGs read, decoded and preprocessed, a second of one core's own time."""
    from data.config import DataConfig
    from data.images import PixelImages

    side = preset.vision["image_size"]
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = SimpleNamespace(image_processor=CLIPImageProcessor(**size), replace_image_token=lambda *args: "")
    pixels = PixelImages(DataConfig(sources=[{"path": "none.json"}]), processor)
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3)).save(file.name, quality=90)
        sample = Sample("", [], [Media("image", file.name)])
        pixels(sample)
        start = time.process_time()
        for _ in range(pictures):
            pixels(sample)
        return pictures / (time.process_time() - start)


def private_bytes() -> int:
    """Memory that is this process's alone: mapped files are shared with all others. 0 where there is no /proc."""
    try:
        with open(f"/proc/{os.getpid()}/smaps_rollup") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("Private_Dirty",))
    except (OSError, KeyError):
        return 0


def show(result: dict[str, Any]) -> str:
    facts = [
        ["entries", f"{result['entries']:,} of {result['entry_bytes']:,} bytes"],
        ["on disk", f"{result['disk_bytes'] / GB:.3f} GB ({100 * result['overhead']:.2f} % more than the tokens)"],
        ["written", f"{result['write_entries_per_second']:.0f} entries/s ({result['disk_bytes'] / result['write_seconds'] / GB:.2f} GB/s)"],
        ["index", f"made in {result['index_seconds']:.2f} s, opened in {1000 * result['open_seconds']:.1f} ms, {result['index_bytes'] / 2**20:.1f} MB"],
        ["instead of", f"{result['pixels_per_core_second']:.0f} JPEGs of 640x480 decoded and preprocessed a second of one core"],
        ["66,500 images", f"{result['bytes_of_66500'] / GB:.1f} GB"],
    ]  # fmt: skip
    reads = [
        [entry["workers"], f"{entry['entries_per_second']:.0f}", f"{entry['entries_per_second'] * result['entry_bytes'] / GB:.2f}",
         f"{entry['own_bytes_a_worker'] / 2**20:.1f}"]
        for entry in result["reads"]
    ]  # fmt: skip
    tables = [
        measure.table(["cache", result["preset"]], facts),
        measure.table(["reading processes", "entries/s", "GB/s", "private MB"], reads),
    ]
    return "\n\n".join(tables)
