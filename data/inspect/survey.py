"""What a data set consists of, measured by making every item as training does and keeping only numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset

from data.dataset import Encoder, InstructionDataset
from data.sample import Rejection, Sample
from data.stream import StreamedDataset


@dataclass(frozen=True, slots=True)
class Facts:
    """One sample in numbers (all but the names: tokens, or counts). `before`: tokens before it was cut to `data.max_length`."""

    id: str
    source: str
    text: int
    image: int
    supervised: int
    images: int
    rounds: int
    before: int

    @property
    def total(self) -> int:
        return self.text + self.image


class Measure:
    """A sample → its `Facts`, or whatever keeps the encoder from making an item of it."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, sample: Sample) -> Facts:
        encoded, _, before = self.encoder.encode(sample)
        image = sum(end - start for start, end in encoded.images.values())
        return Facts(
            id=sample.id,
            source=sample.source,
            text=len(encoded.input_ids) - image,
            image=image,
            supervised=encoded.supervised,
            images=len(encoded.images),
            rounds=sum(message.role == "assistant" for message in sample.messages),
            before=before,
        )


@dataclass
class Survey:
    """Everything measured. `share` is the part of an epoch that was looked at, None for a stream."""

    facts: list[Facts] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    share: float | None = None

    def add(self, found: Facts | Rejection) -> None:
        if isinstance(found, Rejection):
            self.rejections.append(found)
        else:
            self.facts.append(found)

    @property
    def read(self) -> int:
        return len(self.facts) + len(self.rejections)

    @property
    def rejected(self) -> float:
        return len(self.rejections) / max(self.read, 1)

    @property
    def cut(self) -> list[Facts]:
        return [facts for facts in self.facts if facts.before > facts.total]

    @property
    def reasons(self) -> Counter[str]:
        return Counter(rejection.reason for rejection in self.rejections)

    def duplicates(self) -> int:
        """Samples whose id another sample of the same source has, too."""
        counts = Counter((facts.source, facts.id) for facts in self.facts)
        return sum(count for count in counts.values() if count > 1)

    def column(self, name: str) -> np.ndarray:
        """One number a used sample (samples,)."""
        return np.array([getattr(facts, name) for facts in self.facts], dtype=np.int64)

    def supervised_share(self) -> float:
        """Of all tokens."""
        return float(self.column("supervised").sum() / max(self.column("total").sum(), 1))

    def numbers(self) -> dict[str, Any]:
        """All of it for a file."""
        spread = {
            name: quantiles(self.column(name)) for name in ("total", "text", "image", "supervised", "images", "rounds")
        }
        return {
            "read": self.read,
            "used": len(self.facts),
            "rejected": dict(self.reasons.most_common()),
            "cut": len(self.cut),
            "duplicate_ids": self.duplicates(),
            "share_of_epoch": self.share,
            "supervised_share": self.supervised_share(),
            "by_source": dict(Counter(facts.source for facts in self.facts)),
            "per_sample": spread,
            "rejections": [asdict(rejection) for rejection in self.rejections],
        }


def quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    middle, high = np.percentile(values, [50, 95])
    return {
        "mean": float(values.mean()),
        "median": float(middle),
        "p95": float(high),
        "max": float(values.max()),
        "sum": float(values.sum()),
    }


def survey(data: InstructionDataset | StreamedDataset, limit: int | None, workers: int) -> Iterator[tuple[Survey, int]]:
    """Yield the survey so far, and of how many, every few samples.

    `limit`: that many records, drawn as the first of an epoch; None for all of it (a stream has no all).
    """
    data = data.with_transform(Measure(data.encoder))
    result = Survey()
    chosen: Any = data
    if isinstance(data, InstructionDataset):
        order = data.sampler().order(0)[:limit].tolist()
        result.share, count, chosen = len(order) / max(data.sampler().samples, 1), len(order), Subset(data, order)
    elif limit is None:
        raise ValueError("a stream has no end: give a limit")
    else:
        count = limit
    loader: Iterable[list[Any]] = DataLoader(chosen, batch_size=16, num_workers=workers, collate_fn=list)
    for found in islice((item for batch in loader for item in batch), count):
        result.add(found)
        if result.read % 16 == 0:
            yield result, count
    yield result, count
