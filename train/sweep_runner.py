"""Runs the cells of a sweep as processes, after computing once what they share: visual tokens."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from data.cache.build import build_cache
from train.config import RunConfig
from train.ending import Exit
from train.run import run
from train.scores import LABELS
from train.sweep_cells import Cell
from train.sweep_costs import count_costs
from train.sweep_results import log_summary, write_results
from train.tasks import Task, run_all
from visionzip.words import count_of

COMPLETE = "complete"
"""A file in the folder of a cache that was filled to the end."""


def make_tokens(config: RunConfig) -> int:
    """Fill the token cache of a cell with its training and held-out images."""
    assert config.data.cache is not None
    assert config.eval is not None
    sources = [
        source.model_copy(update={"name": str(number)})
        for number, source in enumerate([*config.data.sources, *config.eval.sources])
    ]
    build_cache(
        config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})}), batch=64, workers=0
    )
    (Path(config.data.cache) / COMPLETE).touch()
    return 0


def costs_path(out: Path, cell: Cell) -> Path:
    return out / "costs" / f"{cell.free}.json"


def with_costs(out: Path, cell: Cell) -> dict[str, Any]:
    """`Cell.results`, and what was counted for its budget."""
    assert cell.results is not None
    try:
        return {**cell.results, "costs": json.loads(costs_path(out, cell).read_text())}
    except (OSError, ValueError):
        return cell.results


class Sweep:
    """Runs the cells that have no results yet, and reports."""

    def __init__(self, out: Path, cells: list[Cell], jobs: int) -> None:
        self.out, self.cells, self.jobs = out, cells, jobs
        self.done = 0

    def run(self) -> int:
        missing = [cell for cell in self.cells if cell.results is None]
        self.say(f"{count_of(len(self.cells), 'cell')}, {len(self.cells) - len(missing)} finished before")
        made = {}
        for config in (cell.config for cell in missing):
            folder = config.data.cache
            if folder is not None and not (Path(folder) / COMPLETE).exists():
                made[folder] = Task(f"tokens {Path(folder).name}", make_tokens, config, Path(folder) / "log.txt")
        for cell in self.cells:
            path = costs_path(self.out, cell)
            if not path.exists():
                action = partial(count_costs, path=str(path))
                made[str(path)] = Task(f"costs {path.stem}", action, cell.config, path.with_suffix(".log"))
        failed = run_all(list(made.values()), self.jobs, self.tell)
        tasks = [Task(cell.name, run, cell.config, cell.folder / "log.txt") for cell in missing]
        self.done = len(self.cells) - len(missing)
        failed += run_all(tasks, self.jobs, self.tell)
        return failed

    def tell(self, task: Task, code: int, seconds: float) -> None:
        if task.action is not run:
            self.say(f"{task.name}: {'made' if not code else f'failed ({code}); see {task.log}'} ({seconds:.0f} s)")
            return
        self.done += 1
        cell = next(cell for cell in self.cells if cell.name == task.name)
        results = cell.results or {}
        found = ", ".join(f"{LABELS[name]} {100 * results[name]:.1f} %" for name in LABELS if name in results)
        what = found if not code else f"failed with exit code {code}; see {task.log}"
        self.say(f"[{self.done}/{len(self.cells)}] {task.name}: {what} ({seconds:.0f} s)")
        if cell.results:
            self.write()

    def write(self) -> str:
        """`sweep.json`, `sweep.md` and `sweep.png` of what is finished; returns the table."""
        return write_results(
            self.out,
            [(cell.axes, cell.free, cell.folder, with_costs(self.out, cell)) for cell in self.cells if cell.results],
        )

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def run_sweep(out: Path, cells: list[Cell], jobs: int) -> int:
    """Run the cells that have no results yet, `jobs` at once, and write what all of them found; returns the exit code."""
    planned = Sweep(out, cells, jobs)
    try:
        failed = planned.run()
    except KeyboardInterrupt:
        planned.say("stopped; run the same command to continue")
        return Exit.STOPPED
    if not any(cell.results for cell in cells):
        planned.say("no cell finished: there is nothing to compare")
        return Exit.ERROR
    print(planned.write())
    if any(cell.config.wandb.enabled for cell in cells):
        log_summary(planned.cells[0].config, out)
    return Exit.ERROR if failed else Exit.DONE
