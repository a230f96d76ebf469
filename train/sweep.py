"""Selector x budget x seed, each cell a run of `train.py`'s own program: what each selector keeps, and what fine-tuning adds.

    python -m train.sweep --config configs/tiny-llava/sweep.yaml --out runs/sweep selector=visionzip,divprune budget=8,16 seed=0,1,2

`selector`, `budget` and `seed` are axes; so is any key of the config with several values (`trainer.learning_rate=1e-3,3e-3`,
`train.distill.weight=0.5,1.0`); other `key=value` are put over the file, as for `train.py`. A budget is a number of tokens, split
as the config's own budget of that total, else as in the paper (16 is 13+3), or both numbers (`budget=13+3`).

Visual tokens are computed once a selector and budget, training pictures and held-out ones, and read by all cells. Full tokens are
measured once, training-free ones once a selector and budget. The same command again runs what is missing: finished cells are
kept, and a changed config, model or data file makes new ones. In OUT: `sweep.md`, `sweep.json`, `sweep.png`, `cells/`, `tokens/`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.cli import digest, run_guarded
from train.config import ConfigError, RunConfig, load_config
from train.ending import Exit
from train.evaluate import LABELS
from train.sweep_results import log_summary, write
from train.tasks import Task, run_all
from visionzip import ZipConfig
from visionzip.budgets import parse_budget

SHORT = {"selector": "zip.selector", "seed": "seed"}
BUDGET = "budget"
COMPLETE = "complete"  # a file in the folder of a cache that was filled to the end


@dataclass
class Cell:
    """One run. `axes`: the values that make it this one, as they were given. `free`: cells of equal `free` share the
    training-free result; the one among them that `config.eval.compare` says so measures it."""

    axes: dict[str, str]
    config: RunConfig
    free: str = ""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = "-".join(slug(name, value) for name, value in self.axes.items()) or "only"

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def results(self) -> dict[str, Any] | None:
        """What the finished run wrote; None while there is none."""
        try:
            return json.loads((self.folder / "report" / "results.json").read_text())
        except (OSError, ValueError):
            return None


def slug(name: str, value: str) -> str:
    short = {"seed": "s", "selector": "", BUDGET: ""}.get(name, name.rsplit(".", 1)[-1] + "=")
    return short + re.sub(r"[^\w.+=]+", "_", value).strip("_")[-40:]


def axes_of(items: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """`key=value` arguments → axes with their values, and the overrides that hold for all cells.

    Raises:
        ConfigError: no `=`, or an axis given twice.
    """
    axes: dict[str, list[str]] = {}
    overrides = []
    for item in items:
        key, equals, value = item.partition("=")
        values = split(value)
        if not equals or not key:
            raise ConfigError(f"{item!r}: expected key=value, for example selector=visionzip,divprune")
        if key not in (*SHORT, BUDGET) and len(values) == 1:
            overrides.append(item)
        elif key in axes:
            raise ConfigError(f"the axis {key} is given twice")
        else:
            axes[key] = list(dict.fromkeys(values))
    return axes, overrides


def split(text: str) -> list[str]:
    """At commas that are inside no brackets, braces or quotes."""
    parts = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|'[^']*'|\"[^\"]*\"|[^,])+", text)
    return [part.strip() for part in parts] or [""]


def budget_of(value: str, config: ZipConfig) -> tuple[int | float, int | float]:
    """A budget of the sweep (`visionzip.budgets`) → dominant and contextual tokens, or shares.

    Raises:
        ConfigError: not a budget, or one of all tokens, which are measured anyway.
    """
    try:
        budget = parse_budget(value, config)
    except ValueError as error:
        raise ConfigError(f"budget={value}: {error}") from None
    if budget is None:
        raise ConfigError(f"budget={value}: full tokens are measured once for all cells; give compressed budgets")
    return budget.dominant, budget.contextual


def make_cells(path: str, out: Path, items: Sequence[str], cached: bool = True) -> list[Cell]:
    """Every combination of the axes, the last one changing fastest.

    Raises:
        ConfigError: an axis or a value that the config does not take; no evaluation, which is all a sweep is for.
    """
    axes, overrides = axes_of(items)
    base = load_config(path, overrides)
    if base.eval is None:
        raise ConfigError(f"{path} has no eval section: a sweep compares answers to held-out questions")
    if not base.report.enabled:
        raise ConfigError("report.enabled=false: the results of a cell are read from its report")
    cells, measured = [], set()
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        cell = Cell(chosen, configure(path, base, [*overrides, *settings(chosen, base)]))
        place(cell, out, cached and not any(source.streaming for source in base.data.sources))
        assert cell.config.eval is not None
        full = digest([seen(cell.config), "full"])
        cell.free = digest([seen(cell.config), cell.config.zip.model_dump()])
        wanted = [("full", full), ("training_free", cell.free)]
        compare = [name for name, key in wanted if key not in measured and name in cell.config.eval.compare]
        measured |= {key for _, key in wanted}
        cell.config = cell.config.model_copy(update={"eval": cell.config.eval.model_copy(update={"compare": compare})})
        cells.append(cell)
    return cells


def settings(chosen: dict[str, str], base: RunConfig) -> list[str]:
    """Overrides of the config that put a cell at its place on the axes."""
    made = []
    for name, value in chosen.items():
        if name == BUDGET:
            dominant, contextual = budget_of(value, base.zip)
            made += [f"zip.dominant={dominant}", f"zip.contextual={contextual}"]
        else:
            made.append(f"{SHORT.get(name, name)}={value}")
    return made


def configure(path: str, base: RunConfig, overrides: list[str]) -> RunConfig:
    return load_config(path, overrides) if overrides else base


def place(cell: Cell, out: Path, cached: bool) -> None:
    """Give the cell its folder, its group on W&B and the caches it reads. The folder's name has what the result depends on."""
    config = cell.config
    update: dict[str, Any] = {
        "wandb": config.wandb.model_copy(update={"group": config.wandb.group or out.name, "name": cell.name})
    }
    key = digest([config.model_dump(exclude={"output_dir", "wandb", "report"}), files(config)])
    update["output_dir"] = str(out / "cells" / f"{cell.name}-{key[:8]}")
    assert config.eval is not None
    if cached:
        tokens = str(out / "tokens" / digest([seen(config), config.data.model_dump(), config.zip.model_dump()]))
        update["data"] = config.data.model_copy(update={"cache": config.data.cache or tokens})
        update["eval"] = config.eval.model_copy(update={"cache": config.eval.cache or tokens})
    if config.train.distill is not None and config.train.distill.cache is None:
        distill = config.train.distill.model_dump(exclude={"weight", "cache"})
        answers = str(out / "teacher" / digest([seen(config), config.data.model_dump(exclude={"cache"}), distill]))
        distilled = config.train.distill.model_copy(update={"cache": answers})
        update["train"] = config.train.model_copy(update={"distill": distilled})
    cell.config = config.model_copy(update=update)


def seen(config: RunConfig) -> list[Any]:
    """What an answer of the untrained model depends on, but for what is kept of a picture."""
    assert config.eval is not None
    layout = config.data.model_dump(include={"template", "max_length", "image_aspect_ratio", "frames"})
    return [config.model.model_dump(), config.eval.model_dump(exclude={"compare", "cache"}), layout, files(config)]


def files(config: RunConfig) -> list[Any]:
    """Sizes and times of the model's and the data's files: a retrained model is another one under the same name."""
    assert config.eval is not None
    sources = [source.path for source in [*config.data.sources, *config.eval.sources]]
    paths = [*sorted(Path(config.model.path).glob("*.safetensors")), *map(Path, sources)]
    return [
        [str(path), found.st_size, found.st_mtime_ns] for path in paths if path.is_file() and (found := path.stat())
    ]


# ---------------------------------------------------------------- running


def make_tokens(config: RunConfig) -> int:
    """Fill the cache of a cell: its training pictures and its held-out ones."""
    from data.cache.build import build_cache

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


def make_answers(config: RunConfig) -> int:
    """The teacher's answers that a cell learns from."""
    from train.teacher import run

    assert config.train.distill is not None
    code = run(config)
    if code == 0:
        (Path(config.train.distill.cache or "") / COMPLETE).touch()
    return code


def run_cell(config: RunConfig) -> int:
    from train.cli import run

    return run(config)


class Sweep:
    """The cells of one command and what is known of them."""

    def __init__(self, out: Path, cells: list[Cell], jobs: int) -> None:
        self.out, self.cells, self.jobs = out, cells, jobs
        self.done = 0

    def run(self) -> int:
        missing = [cell for cell in self.cells if cell.results is None]
        self.say(f"{len(self.cells)} cells, {len(self.cells) - len(missing)} finished before")
        made = {}
        for config in (cell.config for cell in missing):
            teacher = config.train.distill.cache if config.train.distill else None
            for folder, action in ((config.data.cache, make_tokens), (teacher, make_answers)):
                if folder is not None and not (Path(folder) / COMPLETE).exists():
                    made[folder] = Task(
                        f"{Path(folder).parent.name} {Path(folder).name}", action, config, Path(folder) / "log.txt"
                    )
        failed = run_all(list(made.values()), self.jobs, self.tell)
        tasks = [Task(cell.name, run_cell, cell.config, cell.folder / "log.txt") for cell in missing]
        self.done = len(self.cells) - len(missing)
        failed += run_all(tasks, self.jobs, self.tell)
        return failed

    def tell(self, task: Task, code: int, seconds: float) -> None:
        if task.action is not run_cell:
            self.say(f"{task.name}: {'made' if not code else f'failed ({code}); see {task.log}'} ({seconds:.0f} s)")
            return
        self.done += 1
        cell = next(cell for cell in self.cells if cell.name == task.name)
        results = cell.results or {}
        found = ", ".join(f"{LABELS[name]} {100 * results[name]:.1f} %" for name in LABELS if name in results)
        what = found if not code else f"failed with exit code {code}; see {task.log}"
        self.say(f"[{self.done}/{len(self.cells)}] {task.name}: {what} ({seconds:.0f} s)")
        self.write()

    def write(self) -> str:
        """`sweep.json`, `sweep.md` and `sweep.png` of what is finished; returns the table."""
        return write(
            self.out, [(cell.axes, cell.free, cell.folder, cell.results) for cell in self.cells if cell.results]
        )

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the YAML file of a run; see configs/")
    parser.add_argument("--out", required=True, help="folder of the sweep")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, a process each (default: 1)")
    parser.add_argument("--pixels", action="store_true", help="compute visual tokens in every run, in place of once")
    parser.add_argument("values", nargs="*", metavar="key=value[,value…]")
    given = parser.parse_intermixed_args(arguments)
    if given.jobs < 1:
        parser.error("--jobs must be at least 1")
    return run_guarded(lambda: sweep(given))


def sweep(given: argparse.Namespace) -> int:
    out = Path(given.out)
    planned = Sweep(out, make_cells(given.config, out, given.values, cached=not given.pixels), given.jobs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "command.txt").write_text(" ".join(["python -m train.sweep", *sys.argv[1:]]) + "\n")
    try:
        failed = planned.run()
    except KeyboardInterrupt:
        planned.say("stopped; the same command goes on")
        return Exit.STOPPED
    print(planned.write())
    if any(cell.config.wandb.enabled for cell in planned.cells):
        log_summary(planned.cells[0].config, out)
    return Exit.ERROR if failed else Exit.DONE


if __name__ == "__main__":
    raise SystemExit(main())
