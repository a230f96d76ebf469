"""Look at a run's data before renting GPUs: `python -m data.inspect --config configs/….yaml [key=value …]`.

Reads the `model`, `zip` and `data` sections of a training config, makes items exactly as training does (no weights are loaded),
and says how long they are, what would be dropped and why, and shows a few with the supervised part in colour.
Ends with 1 where a run would stop because too much is bad.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.config import DataConfig, PipelineConfig, load_config
from data.dataset import InstructionDataset, build_dataset
from data.measure import Survey, survey
from data.sample import Rejection, Sample
from data.stream import StreamedDataset, build_stream, is_streamed

LIMIT = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        whole = load_config(options.config, options.overrides)
        config = whole.data
        data = open_data(config, load_processor(whole, compress=not options.uncompressed))
        result = measure(data, None if options.all else options.limit, options.workers)
    except (ValueError, OSError) as error:
        print(f"config error: {error}", file=sys.stderr)
        return 2
    from data.inspect_report import report

    too_many = report(console, config, data, result)
    if options.samples:
        from data.inspect_samples import show_samples

        show_samples(console, data, first_samples(data, options.samples))
    if options.out:
        write(Path(options.out), config, result)
        console.print(f"\n[dim]written: {options.out}/inspect.png, inspect.json, rejected.jsonl[/dim]")
    return int(too_many)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m data.inspect", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--config", required=True, help="a training config; its model, zip and data sections are read")
    parser.add_argument("--limit", type=int, default=LIMIT, help="samples looked at (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="look at every sample of an epoch")
    parser.add_argument("--samples", type=int, default=3, help="samples shown in full (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes reading (default: %(default)s)")
    parser.add_argument("--uncompressed", action="store_true", help="count all visual tokens, leaving zip out")
    parser.add_argument(
        "--out", default="runs/inspect", help="folder for the picture and the lists (default: %(default)s)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="put over the file, e.g. data.max_length=1024"
    )
    return parser.parse_args(arguments)


def load_processor(config: PipelineConfig, compress: bool = True) -> Any:
    """The processor of `model.path`, which asks for as many placeholders as the compressed model takes.

    The model is built without memory for its weights: only its shapes are needed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from visionzip import attach

    path, options = config.model.path, config.model.source_options
    processor = AutoProcessor.from_pretrained(path, **options)
    if compress:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                AutoConfig.from_pretrained(path, **options), trust_remote_code=config.model.trust_remote_code
            )
        attach(model, processor, config.zip)
        processor.visionzip_model = model  # the processor lives as long as its model
    return processor


def open_data(config: DataConfig, processor: Any) -> InstructionDataset | StreamedDataset:
    if is_streamed(config):
        return build_stream(config, processor, seed=0, rank=0, world_size=1)
    return build_dataset(config, processor, seed=0)


def measure(data: InstructionDataset | StreamedDataset, limit: int | None, workers: int) -> Survey:
    """The survey, with a bar on the terminal while it is made."""
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    result = Survey()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)
        for result, count in survey(data, limit, workers):
            progress.update(task, total=count, completed=result.read)
    data.make = data.encoder
    return result


def first_samples(data: InstructionDataset | StreamedDataset, count: int) -> list[Sample]:
    """The first `count` usable samples of an epoch."""
    if isinstance(data, InstructionDataset):
        found = (data.sample(int(index)) for index in data.sampler().order(0))
        return list(islice((sample for sample in found if isinstance(sample, Sample)), count))
    data.make = lambda sample: sample
    samples = list(islice((sample for sample in iter(data) if isinstance(sample, Sample)), count))
    data.make = data.encoder
    return samples


def write(folder: Path, config: DataConfig, result: Survey) -> None:
    from data.inspect_plot import plot

    folder.mkdir(parents=True, exist_ok=True)
    plot(result, config.max_length, folder / "inspect.png")
    numbers = result.numbers()
    rejections: list[Rejection] = numbers.pop("rejections")
    (folder / "inspect.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps(rejection, ensure_ascii=True) + "\n" for rejection in rejections]
    (folder / "rejected.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
