"""Rejected records: counted by reason, listed in a file, and the end of a run when there are too many."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.storage import replacing

logger = logging.getLogger(__name__)

REASONS = {
    "broken JSON": "the line or array element is not JSON",
    "not UTF-8": "bytes that are not UTF-8, or half a surrogate pair",
    "wrong type": "a field has an unexpected type",
    "unknown layout": "no known columns, or a mapped column is not there",
    "unknown role": "a turn by somebody who is neither system, user nor assistant",
    "empty conversation": "no turns",
    "turn order": "two turns of the same side in a row, or a system message in the middle",
    "no answer": "no turn by the assistant",
    "empty answer": "an assistant's turn without text",
    "empty question": "a user's turn with neither text nor image",
    "image count": "more or fewer <image>/<video> markers than images",
    "misplaced image": "an image in an answer or a system message",
    "path outside the image root": "a path that climbs out of the image root",
    "remote image": "a URL; nothing is downloaded during training",
    "file missing": "no such file, not a regular file, or not readable",
    "empty file": "a file of zero bytes",
    "unreadable image": "truncated, damaged, or not an image",
    "image too large": "more pixels than data.max_pixels",
    "image refused": "by the model's image processor (Qwen: 200 times as wide as high)",
    "unreadable video": "damaged, no video stream, or no frames",
    "template": "the conversation template has no form for it",
    "too long": "more tokens than data.max_length, and cutting would go through an image or leave no answer",
    "not in the cache": "data.cache is set and does not contain the image",
    "damaged cache": "the image's tokens do not match their checksum; python -m data.cache repairs them",
    "unexpected error": "anything else; the detail names the exception",
}

SOONEST = 1000
"""Records. Until so many were read the share is taken of this many: one bad sample of the first ten stops nothing."""

ALWAYS_ALLOWED = 3
"""Records that may be rejected however small the data set, but no more than one in `SMALLEST_SHARE`."""

SMALLEST_SHARE = 20


def count_allowed(max_rejected: float, records: int) -> int:
    """How many of so many records may be rejected: the share `max_rejected` of them, but at least `ALWAYS_ALLOWED`, or one in
    `SMALLEST_SHARE` of a set so small that this is less. With `max_rejected=0` none."""
    if max_rejected == 0:
        return 0
    return max(int(max_rejected * records), min(ALWAYS_ALLOWED, records // SMALLEST_SHARE))


class TooManyRejected(RuntimeError):
    """More of the data is bad than `data.max_rejected` allows."""


class RejectLog:
    """Rejected records of a run, each once however many epochs read it. Used by one process.

    `path`: JSON Lines, one rejection a line; what an interrupted run left there is kept with `resume`.
    `total`: how many records there are; with it a small data set is judged by its own size.
    """

    def __init__(self, path: str | Path, max_rejected: float, total: int | None = None, resume: bool = False) -> None:
        self.path = Path(path)
        self.max_rejected = max_rejected
        self.total = total
        self.reads = 0
        self.reasons: Counter[str] = Counter()
        self._seen: set[tuple[Any, ...]] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists():
            self._recall()
        else:
            self.path.write_text("")

    @property
    def rejected(self) -> int:
        return len(self._seen)

    def read(self, count: int) -> None:
        """`count` more records were read, used or not."""
        self.reads += count

    def add(self, rejections: Iterable[Mapping[str, Any]], looked_at: int = 0) -> list[Mapping[str, Any]]:
        """Note rejections (dicts with `id`, `source`, `reason`, and `index`, `detail`); returns those not known before.

        Args:
            looked_at: of so many records that were not read (`data.precheck`); only for the message.

        Raises `TooManyRejected` once there are more than `count_allowed`; they are in the file by then.
        """
        new = [rejection for rejection in rejections if self._note(rejection)]
        if new:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(dict(rejection), ensure_ascii=False) + "\n" for rejection in new)
            self.check(looked_at)
        return new

    def check(self, looked_at: int = 0) -> None:
        """Raises `TooManyRejected` where too many are bad already, whatever comes."""
        soonest = SOONEST if self.total is None else min(SOONEST, self.total)
        reads = self.reads if self.total is None else min(self.reads, self.total)
        of = max(reads, soonest)
        if self.rejected > count_allowed(self.max_rejected, of):
            raise TooManyRejected(
                f"{self.rejected} bad record{'s' if self.rejected > 1 else ''} among the first "
                f"{max(reads, looked_at, self.rejected)} read; "
                f"data.max_rejected={self.max_rejected:g} allows {count_allowed(self.max_rejected, of)} of {of}. "
                f"{self.summary()}. Each is listed in {self.path}; fix or remove them, or raise data.max_rejected"
            )

    def summary(self) -> str:
        """`12 file missing, 3 turn order`, the most common first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common()) or "none"

    def _note(self, rejection: Mapping[str, Any]) -> bool:
        key = (rejection.get("source"), rejection.get("id"), rejection.get("index"))
        if key in self._seen:
            return False
        self._seen.add(key)
        self.reasons[str(rejection.get("reason"))] += 1
        return True

    def _recall(self) -> None:
        """Take up the list of the run before; a line half written when it was killed is dropped from the file."""
        whole = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rejection = json.loads(line)
            except ValueError:
                continue
            if isinstance(rejection, dict) and self._note(rejection):
                whole.append(json.dumps(rejection, ensure_ascii=False) + "\n")
        with replacing(self.path) as file:
            file.write("".join(whole).encode())
