"""check a run's data before renting GPUs

  visionzip data --config configs/llava-1.5-7b/ft-64.yaml
  visionzip data --config configs/llava-1.5-7b/ft-64.yaml --all data.max_length=1024

Makes items exactly as training does (no weights are loaded), reports their lengths, which records would be rejected and why, and shows a
few with the supervised part in colour. The exit code is 1 if a run would stop because too many records are bad.
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

from data.cache.identity import check_identity, settings
from data.commands._shared import add_config, run_guarded, start
from data.config import DataConfig, PipelineConfig, load_config
from data.dataset import InstructionDataset, build_dataset
from data.inspect.survey import Survey, survey
from data.partial import as_config_error, load_processor, load_shapes
from data.sample import Rejection, Sample
from data.stream import StreamedDataset, build_stream, is_streamed
from visionzip.argument_types import at_least

LIMIT = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--limit", type=at_least(1), default=LIMIT, help="samples read (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="read every sample of an epoch")
    parser.add_argument("--samples", type=at_least(0), default=3, help="samples shown in full (default: %(default)s)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that read (default: %(default)s)")
    parser.add_argument("--uncompressed", action="store_true", help="count all visual tokens, leaving zip out")
    parser.add_argument("--out", default="runs/inspect", help="folder for plot and lists (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    return run_guarded("data.inspect", lambda: inspect(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    return start(sys.modules[__name__], "python -m data.inspect", arguments)


def inspect(options: argparse.Namespace) -> int:
    from data.inspect.report import print_report
    from data.inspect.samples import show_samples

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    config = load_config(options.config, options.overrides)
    data = open_data(config.data, prepare_processor(config, compress=not options.uncompressed))
    result = measure(data, None if options.all else options.limit, options.workers)
    too_many = print_report(console, config.data, data, result)
    if options.samples:
        show_samples(console, data, first_samples(data, options.samples))
    if options.out:
        write(Path(options.out), config.data, result)
        console.print(f"\n[dim]written: {options.out}/inspect.png, inspect.json, rejected.jsonl[/dim]")
    return int(too_many)


def prepare_processor(config: PipelineConfig, compress: bool = True) -> Any:
    """The processor of `model.path`, which asks for as many placeholders as the compressed model takes.

    The model is built without memory for its weights: only its shapes are needed. Of a token cache all but the encoder's weights is
    compared with the config.
    """
    from visionzip import attach

    processor = load_processor(config.model)
    if compress:
        with as_config_error("model / zip"):
            model = load_shapes(config.model)
            attach(model, processor, config.zip)
        processor.visionzip_model = model  # the processor lives as long as its model
        if config.data.cache is not None:
            check_identity(config.data.cache, settings(processor, config.zip, config.data, config.model.dtype))
    elif config.data.cache is not None:
        raise ValueError("--uncompressed: a token cache has only the tokens that were kept; add data.cache=null")
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
    return result


def first_samples(data: InstructionDataset | StreamedDataset, count: int) -> list[Sample]:
    """The first `count` usable samples of an epoch."""
    if isinstance(data, InstructionDataset):
        found = (data.sample(int(index)) for index in data.sampler().order(0))
        return list(islice((sample for sample in found if isinstance(sample, Sample)), count))
    stream = iter(data.with_transform(lambda sample: sample))
    return list(islice((sample for sample in stream if isinstance(sample, Sample)), count))


def write(folder: Path, config: DataConfig, result: Survey) -> None:
    from data.inspect.plot import draw_survey

    folder.mkdir(parents=True, exist_ok=True)
    draw_survey(result, config.max_length, folder / "inspect.png")
    numbers = result.numbers()
    rejections: list[Rejection] = numbers.pop("rejections")
    (folder / "inspect.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps(rejection, ensure_ascii=True) + "\n" for rejection in rejections]
    (folder / "rejected.jsonl").write_text("".join(lines), encoding="utf-8")
