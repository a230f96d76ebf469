"""What training writes: runs, checkpoints, token caches. Read as files: the library does not know the program."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from visionzip.config import ZipConfig
from visionzip.description import Description, bytes_of, format_count, format_results, format_size
from visionzip.export.base import RESULTS, RUN_CONFIG, is_run, run_result
from visionzip.export.card import budget_words, format_settings
from visionzip.export.files import read_json
from visionzip.fingerprint import short_digest
from visionzip.manifest import find_problems

CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def describe_checkpoint(path: Path) -> Description | None:
    if not (path / "manifest.json").is_file():
        if CHECKPOINT.match(path.name) and path.is_dir():
            return Description(
                "a checkpoint without a manifest: not complete, or of another program",
                facts={"Size": format_size(bytes_of(path))},
            )
        return None
    try:
        manifest = read_json(path / "manifest.json")
    except ValueError as error:
        return Description("a checkpoint whose manifest can't be read", problems=[str(error)])
    if not str(manifest.get("format", "")).startswith("visionzip-checkpoint/"):
        return None
    found = Description("a complete checkpoint of a run", use=[f"python train.py --config … trainer.resume={path}"])
    files = manifest.get("files", {})
    try:
        found.problems = find_problems(path, manifest, "manifest.json")
        found.facts["Files"] = ", ".join(f"{name} ({format_size(entry['bytes'])})" for name, entry in files.items())
        progress = read_json(path / "progress.json")
        found.facts["Step"] = f"{progress['step']:,} of {progress['max_steps']:,} (epoch {progress['epoch'] or 0:.2f})"
        found.facts["Processes"] = f"{progress['world_size']}; a run can resume with any number and any ZeRO stage"
        found.facts["Batch"] = "{} per process, accumulated {} times".format(*progress["batch"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        found.problems.append(f"it can't be read ({type(error).__name__}: {error})")
    if found.problems:
        found.what, found.use = "a damaged checkpoint, which resuming skips", []
    found.facts["Size"] = f"{format_size(bytes_of(path))}: trainable weights and optimizer state, no frozen weights"
    return found


def describe_cache(path: Path) -> Description | None:
    if not (path / "cache.json").is_file():
        return None
    try:
        manifest = read_json(path / "cache.json")
        if not str(manifest.get("format", "")).startswith("visionzip-tokens/"):
            return None
        shards = sorted(path.glob("*.tokens"))
        config = ZipConfig.model_validate(manifest["zip"])
        found = Description("a cache of compressed visual tokens, to train from without the vision tower")
        found.facts["Budget"] = budget_words(config)
        found.facts["Settings"] = format_settings(config)
        found.facts["Made with encoder"] = short_digest(manifest["encoder"])
        found.facts["Stored as"] = str(manifest["dtype"])
        found.facts["Shards"] = f"{len(shards):,} ({format_size(sum(shard.stat().st_size for shard in shards))})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Description("a token cache whose cache.json can't be read", problems=[str(error)])
    unfinished = list(path.glob(".*.part"))
    if unfinished:
        found.facts["Being written"] = f"{len(unfinished)} (or left by a writer that was killed)"
    if not shards:
        found.problems.append("it has no shards yet")
    return found


def describe_run(path: Path) -> Description | None:
    if not is_run(path):
        return None
    checkpoints = sorted(
        (p for p in path.iterdir() if CHECKPOINT.match(p.name)), key=lambda p: int(p.name.split("-")[1])
    )
    results = {form: path / folder for form, folder in RESULTS.items() if (path / folder).is_dir()}
    found = Description(f"a training run, {'finished' if results else 'not finished'}")
    losses = [line for line in read_lines(path / "metrics.jsonl") if isinstance(line.get("loss"), int | float)]
    if losses:
        found.facts["Last step logged"] = f"{losses[-1].get('step', '?')}, loss {losses[-1]['loss']:.4g}"
    found.facts["Checkpoints"] = ", ".join(p.name for p in checkpoints[-4:]) or "none"
    if (path / "report" / "results.json").is_file():
        try:
            measured = read_json(path / "report" / "results.json")
            found.facts["Measured"] = (
                f"{format_results(measured)} at {measured.get('tokens')} of {measured.get('of_tokens')} tokens"
            )
            found.facts["Trained"] = f"{format_count(measured.get('trainable_parameters', 0))} parameters"
        except (ValueError, TypeError) as error:
            found.problems.append(str(error))
    if results:
        found.facts["Result"] = f"{run_result(path).name}/ (a run directory stands for it in every command)"
    found.facts["Size"] = format_size(bytes_of(path))
    if results:
        found.use = [
            f"visionzip inspect {run_result(path)}",
            f'model, processor = visionzip.load("{path}")',
            f"visionzip chat {path} --image photo.jpg",
        ]
    elif checkpoints:
        found.use = [f"python train.py --config {path / RUN_CONFIG}   # resumes from {checkpoints[-1].name}"]
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; one that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]
