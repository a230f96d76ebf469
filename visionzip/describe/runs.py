"""What training leaves behind: runs, checkpoints, token caches. Read as files: the library does not know the program."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from visionzip.describe.base import Description, kind, number, size
from visionzip.describe.exports import total
from visionzip.export.card import budget_words, settings
from visionzip.export.files import read_json
from visionzip.fingerprint import short

CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


@kind("checkpoint", rank=20)
def checkpoint(path: Path) -> Description | None:
    if not (path / "manifest.json").is_file():
        if CHECKPOINT.match(path.name) and path.is_dir():
            return Description(
                "a checkpoint without a manifest: not complete, or of another program",
                facts={"Size": size(total(path))},
            )
        return None
    try:
        manifest = read_json(path / "manifest.json")
    except ValueError as error:
        return Description("a checkpoint whose manifest can't be read", problems=[str(error)])
    if not str(manifest.get("format", "")).startswith("visionzip-checkpoint/"):
        return None
    found = Description(
        "a checkpoint of a run, complete", facts={}, use=[f"python train.py --config … trainer.resume={path}"]
    )
    found.problems = damage(path, manifest)
    if found.problems:
        found.what, found.use = "a damaged checkpoint, which resuming passes over", []
    try:
        progress = read_json(path / "progress.json")
        found.facts["Step"] = f"{progress['step']:,} of {progress['max_steps']:,} (epoch {progress['epoch'] or 0:.2f})"
        found.facts["Processes"] = f"{progress['world_size']}; any number and any ZeRO stage can go on from it"
        found.facts["Batch"] = "{} a process, accumulated {} times".format(*progress["batch"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        found.problems.append(f"progress.json: {error}")
    found.facts["Files"] = ", ".join(
        f"{name} ({size(entry['bytes'])})" for name, entry in manifest.get("files", {}).items()
    )
    found.facts["Size"] = f"{size(total(path))}: what trains and the optimizer, no frozen weight"
    return found


def damage(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Files of a checkpoint that are missing or not what the manifest says."""
    found = []
    for name, entry in manifest.get("files", {}).items():
        file = path / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            found.append(f"{name} has {file.stat().st_size:,} bytes; expected {entry['bytes']:,}")
        elif digest(file) != entry["sha256"]:
            found.append(f"{name} was changed (its checksum differs)")
    return found


def digest(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    sum_of = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            sum_of.update(piece)
    return sum_of.hexdigest()


@kind("cache", rank=21)
def cache(path: Path) -> Description | None:
    if not (path / "cache.json").is_file():
        return None
    try:
        manifest = read_json(path / "cache.json")
        if not str(manifest.get("format", "")).startswith("visionzip-tokens/"):
            return None
        shards = sorted(path.glob("*.tokens"))
        found = Description("a cache of compressed tokens, to train from without the vision tower")
        found.facts["Kept of a picture"] = budget_words(manifest["zip"])
        found.facts["Settings"] = settings(manifest["zip"])
        found.facts["Made with encoder"] = short(manifest["encoder"])
        found.facts["Stored as"] = str(manifest["dtype"])
        found.facts["Shards"] = f"{len(shards):,} ({size(sum(shard.stat().st_size for shard in shards))})"
    except (ValueError, KeyError, TypeError) as error:
        return Description("a token cache whose cache.json can't be read", problems=[str(error)])
    unfinished = [file.name for file in path.iterdir() if file.name.startswith(".") and file.is_file()]
    if unfinished:
        found.facts["Being written"] = f"{len(unfinished)} (or left by a writer that was killed)"
    if not shards:
        found.problems.append("there is no shard in it yet")
    return found


@kind("run", rank=25)
def run(path: Path) -> Description | None:
    if not (path / "config.yaml").is_file():
        return None
    checkpoints = sorted(
        (p for p in path.iterdir() if CHECKPOINT.match(p.name)), key=lambda p: int(p.name.split("-")[1])
    )
    projector = (path / "projector").is_dir()
    found = Description(f"a training run, {'finished' if projector else 'not finished'}")
    lines = last_lines(path / "metrics.jsonl")
    losses = [line for line in lines if "loss" in line]
    if losses:
        found.facts["Last step logged"] = f"{losses[-1].get('step', '?')}, loss {losses[-1]['loss']:.4g}"
    found.facts["Checkpoints"] = ", ".join(p.name for p in checkpoints[-4:]) or "none"
    results = path / "report" / "results.json"
    if results.is_file():
        try:
            facts = read_json(results)
            names = {"full": "all tokens", "training_free": "compressed", "fine_tuned": "fine-tuned"}
            shown = [
                f"{label} {100 * facts[name]:.1f} %"
                for name, label in names.items()
                if isinstance(facts.get(name), float)
            ]
            found.facts["Measured"] = f"{', '.join(shown)} at {facts.get('tokens')} of {facts.get('of_tokens')} tokens"
            found.facts["Trained"] = f"{number(facts.get('trainable_parameters', 0))} parameters"
        except ValueError as error:
            found.problems.append(str(error))
    found.facts["Size"] = size(total(path))
    if projector:
        found.use = [
            f"visionzip inspect {path / 'projector'}",
            f'model, processor = visionzip.load("{path / "projector"}")',
        ]
    elif checkpoints:
        found.use = [f"python train.py --config {path / 'config.yaml'}   # goes on from {checkpoints[-1].name}"]
    return found


def last_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; one that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]
