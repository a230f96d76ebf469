"""What a large data file costs: indexing it, memory a worker, samples a second.

    python -m scripts.benchmark_data                       # 10,000, 100,000 and 1,000,000 records
    python -m scripts.benchmark_data --records 5000000     # another size

Writes LLaVA records without images into a temporary folder, indexes them, and reads samples at random through workers, each
to token ids and labels with the `llava_v1` template. `private` is what a worker has for itself alone; `resident` also counts
what all processes share (libraries, the parent's pages). `again s`: opening a file whose index is there already. `per CPU s`:
samples one busy core makes, whatever else runs there.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from data.config import DataConfig
from data.dataset import InstructionDataset, build_dataset
from data.sample import Rejection

WORDS = "the a picture of red blue bus dog what is how many where colour on table street two three man sign left"
MB = 2**20


@dataclass
class Result:
    """Times in seconds, memory in MB (2**20 bytes)."""

    records: int
    layout: str
    file_mb: float
    index_seconds: float
    index_cpu_seconds: float
    index_mb: float
    open_again_seconds: float
    resident_mb: float
    private_mb: float
    samples_per_second: float
    samples_per_cpu_second: float


def write_records(path: Path, count: int, lines: bool) -> None:
    """`count` records of one to three rounds; answers of log-normal length, some of them long."""
    draw, words = random.Random(0), WORDS.split()
    texts = [" ".join(draw.choices(words, k=max(1, int(draw.lognormvariate(2.3, 0.9))))) for _ in range(997)]
    with open(path, "w", encoding="utf-8") as file:
        file.write("" if lines else "[")
        for number in range(count):
            turns = []
            for turn in range(1 + number % 3):
                turns.append({"from": "human", "value": texts[(number * 7 + turn) % 499] + "?"})
                turns.append({"from": "gpt", "value": texts[(number * 13 + turn) % 997].capitalize() + "."})
            end = "\n" if lines else (",\n" if number + 1 < count else "]\n")
            file.write(json.dumps({"id": f"{number:09d}", "conversations": turns}) + end)


def memory() -> tuple[float, float]:
    """(resident, private) MB of this process."""
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) / 1024
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


class WithMemory(Dataset):
    """In place of an item: the processor time it took, and now and then its memory."""

    def __init__(self, data: InstructionDataset) -> None:
        self.data = data

    def __getitem__(self, index: int) -> tuple[float, tuple[float, float] | None]:
        began = time.process_time()
        item = self.data[index]
        taken = time.process_time() - began
        if isinstance(item, Rejection):
            raise RuntimeError(f"a made-up record was rejected: {item}")
        return taken, memory() if index % 64 == 0 else None

    def __len__(self) -> int:
        return len(self.data)


def measure(folder: Path, processor: Any, count: int, lines: bool, workers: int, samples: int) -> Result:
    path = folder / f"{count}.{'jsonl' if lines else 'json'}"
    write_records(path, count, lines)
    config = DataConfig.model_validate(
        {"sources": [{"path": str(path)}], "template": "llava_v1", "cache_dir": str(folder / "cache")}
    )
    start, start_cpu = time.perf_counter(), time.process_time()
    build_dataset(config, processor, 0)
    indexed, indexed_cpu = time.perf_counter(), time.process_time()
    data = build_dataset(config, processor, 0)
    opened = time.perf_counter()
    index = Path(data.sources[0].records.spans.path).stat().st_size  # type: ignore[attr-defined]
    chosen = random.Random(1).choices(range(0, count, 64), k=max(1, samples // 64)) + random.Random(2).choices(
        range(count), k=samples
    )
    loader = DataLoader(WithMemory(data), sampler=chosen, batch_size=32, num_workers=workers, collate_fn=list)
    found: list[tuple[float, tuple[float, float] | None]] = []
    began = time.perf_counter()
    for number, batch in enumerate(loader):
        if number == workers:  # each worker has started by now
            began, done = time.perf_counter(), len(found)
        found += batch
    seconds = time.perf_counter() - began
    measured = [sizes for _, sizes in found if sizes]
    result = Result(
        records=count,
        layout="lines" if lines else "array",
        file_mb=path.stat().st_size / MB,
        index_seconds=indexed - start,
        index_cpu_seconds=indexed_cpu - start_cpu,
        index_mb=index / MB,
        open_again_seconds=opened - indexed,
        resident_mb=max(resident for resident, _ in measured),
        private_mb=max(private for _, private in measured),
        samples_per_second=(len(found) - done) / seconds,
        samples_per_cpu_second=len(found) / sum(taken for taken, _ in found),
    )
    path.unlink()
    return result


def table(results: list[Result], workers: int) -> Table:
    shown = Table(
        title=f"{workers} workers, text-only records to token ids and labels; memory is a worker's",
        title_justify="left",
    )
    heads = ("records", "file", "MB", "index s", "CPU s", "index MB", "again s", "resident MB")
    for head in (*heads, "private MB", "samples/s", "per CPU s"):
        shown.add_column(head, justify="right")
    for r in results:
        times = (
            f"{r.index_seconds:.2f}",
            f"{r.index_cpu_seconds:.2f}",
            f"{r.index_mb:.1f}",
            f"{r.open_again_seconds:.3f}",
        )
        sizes = (f"{r.resident_mb:,.0f}", f"{r.private_mb:,.0f}")
        rates = (f"{r.samples_per_second:,.0f}", f"{r.samples_per_cpu_second:,.0f}")
        shown.add_row(f"{r.records:,}", r.layout, f"{r.file_mb:,.0f}", *times, *sizes, *rates)
    return shown


def make_processor() -> Any:
    """A LLaVA processor with a small SentencePiece tokenizer of the Llama kind."""
    from tests.data.kit import processor

    return processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=20_000, help="read for each size (default: %(default)s)")
    parser.add_argument("--folder", help="where the files are written for a while (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args()
    processor = make_processor()
    sizes = [(count, True) for count in options.records] + [(max(options.records), False)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = [
            measure(Path(folder), processor, count, lines, options.workers, options.samples) for count, lines in sizes
        ]
    if options.json:
        print(json.dumps({"workers": options.workers, "results": [asdict(result) for result in results]}))
    else:
        Console(width=120, highlight=False).print(table(results, options.workers))


if __name__ == "__main__":
    main()
