"""Where the time of one training step of `train.py` goes, by torch.profiler: matrix products, attention, and everything else."""

from __future__ import annotations

from typing import Any

from scripts.benchmarks import measure
from scripts.benchmarks.peer_data import our_config
from scripts.benchmarks.peers import Setting, run_ours

GROUPS = {
    "attention, backward": ("attention", "backward"),
    "attention, forward": ("attention",),
    "matrix products": ("mm",),
    "convolution": ("conv",),
}
"""A group's operators have all of these parts in their names; the first group counts."""


def run(setting: Setting) -> dict[str, Any]:
    """Shares of the operators' own time in the last step, from pixels and from a token cache."""
    setting.make()
    preset = setting.shapes
    budget = {"dominant": preset.dominant, "contextual": preset.contextual}
    ways = {}
    for label, cache in (("from pixels", None), ("from the token cache", setting.work / "tokens")):
        out = setting.work / "runs" / label.replace(" ", "-")
        config = our_config(preset, setting.model, setting.records, out, setting.steps, budget, cache)
        found = run_ours(setting.python, config, {"out": str(out), "threads": setting.threads, "profile": True})
        ways[label] = {"seconds": found["seconds_all"][-1], "operators": found["operators"]}
    return {"preset": setting.preset, "batch": preset.batch, "ways": ways}


def share_groups(operators: dict[str, float]) -> dict[str, float]:
    """Seconds by operator → share of their sum by group, and the largest operators outside of all groups by name."""
    total = sum(operators.values())
    shares = dict.fromkeys(GROUPS, 0.0)
    rest: dict[str, float] = {}
    for name, seconds in operators.items():
        group = next((group for group, parts in GROUPS.items() if all(part in name for part in parts)), None)
        if group is not None:
            shares[group] += seconds / total
        else:
            rest[name] = seconds / total
    largest = sorted(rest, key=rest.__getitem__, reverse=True)[:6]
    others = sum(rest.values()) - sum(rest[name] for name in largest)
    return {**shares, **{name: rest[name] for name in largest}, "others": others}


def show(result: dict[str, Any]) -> str:
    parts = [f"{result['preset']}: the last of the steps, {result['batch']} samples"]
    for label, way in result["ways"].items():
        rows = [[name, f"{100 * share:.1f} %"] for name, share in share_groups(way["operators"]).items()]
        parts.append(f"{label}: {way['seconds']:.2f} s\n\n{measure.table(['operators', 'share of their time'], rows)}")
    return "\n\n".join(parts)
