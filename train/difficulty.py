"""Choose what to train on: the records whose answers change most when visual tokens are taken away.

    python -m train.difficulty --config configs/tiny-llava/demo.yaml --out runs/hard --share 0.1

asks every record of `data.sources` twice, with all visual tokens and compressed but not fine-tuned, and writes the share where most
answers change: `hardest/NAME.json` for each source, in the source's own layout (Parquet where it was not JSON), and `random/NAME.json`,
as many drawn at random, to compare with. `scores.jsonl` has what was measured. An answer is what the model thinks most likely word by
word behind the right words before (one pass for a conversation, no generation); between records that change equally, the rise of
the loss decides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.config import SourceConfig
from data.dataset import InstructionDataset, build_dataset
from data.mixture import subset
from data.processes import own_device
from data.records import image_root, open_records, reader_of
from train.config import ConfigError, RunConfig
from train.loss import IGNORE
from train.teacher import answer_rows, predicted, uncompressed
from visionzip import detach

BATCH = 32


@dataclass(frozen=True)
class Score:
    """One record. Losses are nats a supervised token."""

    source: str
    position: int
    id: str
    answers: int
    changed: int
    loss_full: float
    loss_compressed: float

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is harder."""
        return self.changed / max(self.answers, 1), self.loss_compressed - self.loss_full


@dataclass
class Said:
    """Of one record's ``S`` predicted tokens: the likeliest words, which round each belongs to, and the mean loss."""

    words: Tensor
    rounds: Tensor
    loss: float


def rounds_of(labels: Tensor) -> Tensor:
    """``(L,)`` labels → for each predicted token ``(S,)`` the number of its round: supervised stretches, counted from 0."""
    real = labels[1:] != IGNORE
    starts = real & ~functional.pad(real[:-1], (1, 0), value=False)
    return (starts.cumsum(0) - 1)[real]


def say(model: Any, dataset: InstructionDataset, batch: int = BATCH) -> Iterator[tuple[int, Said]]:
    """What `model` says to each record of `dataset` that can be read, with its index."""
    collate = dataset.collator()
    for start in range(0, len(dataset), batch):
        items = {index: dataset[index] for index in range(start, min(start + batch, len(dataset)))}
        good = {index: item for index, item in items.items() if isinstance(item, dict)}
        if not good:
            continue
        together = collate(list(good.values()))
        for index, logits in zip(good, answer_rows(model, together), strict=False):  # a row more: a blank picture
            labels = good[index]["labels"]
            loss = functional.cross_entropy(logits.float(), predicted(labels).to(logits.device))
            yield index, Said(logits.argmax(dim=1).cpu(), rounds_of(labels), loss.item())


def compare(full: Said, compressed: Said) -> dict[str, Any]:
    differs = (full.words != compressed.words).long()
    answers = int(full.rounds[-1]) + 1
    changed = torch.zeros(answers, dtype=torch.long).index_add_(0, full.rounds, differs).count_nonzero()
    return {
        "answers": answers,
        "changed": int(changed),
        "loss_full": round(full.loss, 6),
        "loss_compressed": round(compressed.loss, 6),
    }


def measure(config: RunConfig) -> list[Score]:
    """Every record that can be read, in the order of the sources.

    Raises:
        ConfigError: data that has no end, or a budget that differs from picture to picture.
    """
    from train.build import build_model

    if any(source.streaming for source in config.data.sources):
        raise ConfigError("data.sources: a streamed source has no records to choose from")
    if config.zip.adaptive is not None:
        raise ConfigError("zip.adaptive: difficulty is measured at one budget for all; leave it out")
    config = config.model_copy(update={"data": uncompressed(config.data)})
    device = own_device()
    model, processor = build_model(config)
    model.to(device).eval()
    build = lambda: build_dataset(config.data, processor, 0)  # noqa: E731
    few = dict(say(model, build()))
    detach(model)
    dataset = build()
    scores = []
    for index, full in say(model, dataset):
        if index in few:
            source, position = dataset.locate(index)
            sample: Any = dataset.sample(index)
            scores.append(Score(source.label, position, sample.id, **compare(full, few[index])))
    return scores


def choose(scores: Sequence[Score], share: float, seed: int = 0) -> tuple[list[Score], list[Score]]:
    """The hardest `share`, and as many at random; both in the order of the file."""
    keep = max(1, round(share * len(scores)))
    order = sorted(range(len(scores)), key=lambda place: (*(-value for value in scores[place].rank), place))
    drawn = subset(len(scores), 1.0, keep, seed)
    return [scores[place] for place in sorted(order[:keep])], [scores[place] for place in drawn.tolist()]


def write_subset(folder: Path, source: SourceConfig, positions: Sequence[int], cache_dir: str | None) -> Path:
    """The records at `positions` of a source as a file that takes its place."""
    folder.mkdir(parents=True, exist_ok=True)
    if reader_of(source) == "json":
        records = open_records(source, cache_dir)
        path = folder / f"{source.label}.json"
        path.write_text(json.dumps([records[position] for position in positions], ensure_ascii=False, indent=0) + "\n")
        return path
    from data.hf import load

    path = folder / f"{source.label}.parquet"
    load(source).select(positions).to_parquet(path)
    return path


def summary(scores: Sequence[Score]) -> str:
    """In a line: how many answers change, and what the loss is before and after."""
    answers, changed = sum(s.answers for s in scores), sum(s.changed for s in scores)
    before, after = (np.mean([getattr(s, name) for s in scores]) for name in ("loss_full", "loss_compressed"))
    return f"{len(scores)} records, {100 * changed / answers:.1f} % of {answers} answers change; loss {before:.3f} to {after:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    from train.cli import run_guarded
    from train.launch import quiet

    parser = argparse.ArgumentParser(
        prog="python -m train.difficulty", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file; see configs/")
    parser.add_argument("--out", required=True, help="folder of the subsets")
    parser.add_argument("--share", type=float, default=0.1, help="of the records that are kept (default: 0.1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="put over the file")
    given = parser.parse_intermixed_args(arguments)
    if not 0 < given.share <= 1:
        parser.error("--share must be above 0 and at most 1")
    quiet(0)
    return run_guarded(lambda: run(given))


def run(given: argparse.Namespace) -> int:
    from train.config import load_config

    config, out = load_config(given.config, given.overrides), Path(given.out)
    scores = measure(config)
    if not scores:
        raise ConfigError("data.sources: no record could be read")
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.jsonl").write_text("".join(json.dumps(asdict(score)) + "\n" for score in scores))
    print(f"all: {summary(scores)}")
    for name, chosen in zip(("hardest", "random"), choose(scores, given.share), strict=True):
        print(f"{name}: {summary(chosen)}")
        for source in config.data.sources:
            positions = [score.position for score in chosen if score.source == source.label]
            if positions:
                path = write_subset(out / name, source, positions, config.data.cache_dir)
                print(f"  {path}  images: {image_root(source)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
