"""Counted, not timed: tokens that go through the LLM, and tokens that ranks wait for, for each way to cut a step's samples."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from data.batching import padded, share
from scripts.benchmarks import measure
from scripts.benchmarks.presets import PRESETS, conversations

Shares = list[list[list[int]]]
STEPS = 20


def run(name: str, layouts: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Layouts are (ranks, accumulation, samples a step). Figures are of the samples' own tokens."""
    preset = PRESETS[name]
    rows = []
    for world, accumulation, samples in layouts:
        lengths = [len(c.input_ids) for c in conversations(preset, STEPS * samples, preset.kept)]
        found: dict[str, Any] = {"ranks": world, "accumulation": accumulation, "samples": samples}
        for way in ("random", "length", "packed"):
            through = waited = 0
            for step in range(STEPS):
                these = lengths[step * samples : (step + 1) * samples]
                shares = cut(way, these, world, accumulation, step)
                cost = cost_of(way, these)
                through += sum(cost(group) for groups in shares for group in groups)
                waited += world * sum(max(cost(groups[turn]) for groups in shares) for turn in range(accumulation))
            found[way] = {"through": through / sum(lengths), "waited": waited / sum(lengths)}
        rows.append(found)
    return {"preset": name, "steps": STEPS, "layouts": rows}


def cut(way: str, lengths: list[int], world: int, accumulation: int, step: int) -> Shares:
    if way != "random":
        return share(lengths, world, accumulation, packed=way == "packed")
    order = random.Random(step).sample(range(len(lengths)), len(lengths))
    size = len(lengths) // (world * accumulation)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [groups[rank * accumulation : (rank + 1) * accumulation] for rank in range(world)]


def cost_of(way: str, lengths: list[int]) -> Callable[[list[int]], int]:
    if way == "packed":
        return lambda group: sum(lengths[place] for place in group)
    return lambda group: padded(lengths, [group])


def show(result: dict[str, Any]) -> str:
    rows = [
        [row["ranks"], row["accumulation"], row["samples"]]
        + [f"{row[way]['through']:.2f} / {row[way]['waited']:.2f}" for way in ("random", "length", "packed")]
        for row in result["layouts"]
    ]
    title = f"{result['preset']}: tokens through the LLM / tokens' time taken by all ranks, of the samples' own tokens; {result['steps']} steps"
    return (
        f"{title}\n\n{measure.table(['ranks', 'accumulation', 'samples per step', 'random', 'length', 'packed'], rows)}"
    )
