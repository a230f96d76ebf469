"""Questions and answers of the data sets that are made here, as records in LLaVA's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Round:
    """One question and its answer; `type` says what kind of question it is."""

    type: str
    question: str
    answer: str


def render_record(name: str, image: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """One conversation about one image. The extra key ``types`` names the type of each round.

    Args:
        name: the record's id.
        image: its path, relative to the folder of images.
    """
    turns = []
    for number, asked in enumerate(rounds):
        turns.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + asked.question})
        turns.append({"from": "gpt", "value": asked.answer})
    return {"id": name, "image": image, "conversations": turns, "types": [asked.type for asked in rounds]}
