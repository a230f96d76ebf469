"""The cells of a sweep: a config for every combination of its axes. A cell's folder is named by a hash of all its result depends on."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.config import ConfigError, RunConfig, load_config
from train.digest import digest
from visionzip import ZipConfig
from visionzip.budgets import parse_budget
from visionzip.selectors import SELECTORS

SHORT = {"selector": "zip.selector", "seed": "seed"}
BUDGET = "budget"
PRESETS: dict[str, dict[str, str]] = {"selectors": {"seed": "0,1,2", "selector": ",".join(SELECTORS.names())}}
"""Name → axes. The table of a preset compares every selector with the controls, `scaled` first of all."""


@dataclass
class Cell:
    """One run.

    Attributes:
        axes: its values on the axes, as they were given.
        free: cells of equal `free` share the training-free result; one of them measures it (`config.eval.compare`).
    """

    axes: dict[str, str]
    config: RunConfig
    free: str = ""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = "-".join(slug(name, value) for name, value in self.axes.items())

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def results(self) -> dict[str, Any] | None:
        """`results.json` of the finished run; None before."""
        try:
            return json.loads((self.folder / "report" / "results.json").read_text())
        except (OSError, ValueError):
            return None


def slug(name: str, value: str) -> str:
    short = {"seed": "s", "selector": "", BUDGET: ""}.get(name, name.rsplit(".", 1)[-1] + "=")
    return short + re.sub(r"[^\w.+=]+", "_", value).strip("_")[-40:]


def parse_axes(items: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """`key=value` arguments → axes with their values, and the overrides that hold for all cells.

    Raises:
        ConfigError: no `=`, or an axis given twice.
    """
    axes: dict[str, list[str]] = {}
    overrides = []
    for item in items:
        key, equals, value = item.partition("=")
        values = split_values(value)
        if not equals or not key:
            raise ConfigError(f"{item!r}: expected key=value, for example selector=visionzip,divprune")
        if key not in (*SHORT, BUDGET) and len(values) == 1:
            overrides.append(item)
        elif key in axes:
            raise ConfigError(f"the axis {key} is given twice")
        else:
            axes[key] = list(dict.fromkeys(values))
    return axes, overrides


def preset_axes(name: str | None, given: Sequence[str]) -> list[str]:
    """The axes of a preset, but for those that are `given`."""
    named = {item.partition("=")[0] for item in given}
    return [f"{axis}={values}" for axis, values in PRESETS[name].items() if axis not in named] if name else []


def split_values(text: str) -> list[str]:
    """Split at commas outside of brackets, braces and quotes."""
    parts = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|'[^']*'|\"[^\"]*\"|[^,])+", text)
    return [part.strip() for part in parts] or [""]


def split_budget(value: str, config: ZipConfig) -> tuple[int | float, int | float]:
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
        ConfigError: no axes, a value that the config refuses, or no evaluation, without which there is nothing to compare.
    """
    axes, overrides = parse_axes(items)
    if not axes:
        raise ConfigError(
            "nothing to compare: give selector=…, budget=…, seed=… or a key with several values, for example budget=8,16"
        )
    for name in axes.get("selector", []):
        try:
            SELECTORS[name]
        except ValueError as error:
            raise ConfigError(f"selector={name}: {error}") from None
    base = load_config(path, overrides)
    if base.eval is None:
        raise ConfigError(f"{path} has no eval section: a sweep compares answers to held-out questions")
    if not base.report.enabled:
        raise ConfigError("report.enabled=false: the results of a cell are read from its report")
    cells, measured = [], set()
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        cell = Cell(chosen, configure(path, base, [*overrides, *axis_overrides(chosen, base)]))
        place_cell(cell, out, cached and not any(source.streaming for source in base.data.sources))
        assert cell.config.eval is not None
        full = digest([untrained_inputs(cell.config), "full"])
        cell.free = digest([untrained_inputs(cell.config), cell.config.zip.model_dump()])
        wanted = [("full", full), ("training_free", cell.free)]
        compare = [name for name, key in wanted if key not in measured and name in cell.config.eval.compare]
        measured |= {key for _, key in wanted}
        cell.config = cell.config.model_copy(update={"eval": cell.config.eval.model_copy(update={"compare": compare})})
        cells.append(cell)
    return cells


def axis_overrides(chosen: dict[str, str], base: RunConfig) -> list[str]:
    """The config overrides of a cell."""
    made = []
    for name, value in chosen.items():
        if name == BUDGET:
            dominant, contextual = split_budget(value, base.zip)
            made += [f"zip.dominant={dominant}", f"zip.contextual={contextual}"]
        else:
            made.append(f"{SHORT.get(name, name)}={value}")
    return made


def configure(path: str, base: RunConfig, overrides: list[str]) -> RunConfig:
    return load_config(path, overrides) if overrides else base


def place_cell(cell: Cell, out: Path, cached: bool) -> None:
    """Set the cell's folder, its W&B group and the caches it reads."""
    config = cell.config
    update: dict[str, Any] = {
        "wandb": config.wandb.model_copy(update={"group": config.wandb.group or out.name, "name": cell.name})
    }
    key = digest([config.model_dump(exclude={"output_dir", "wandb", "report"}), file_stamps(config)])
    update["output_dir"] = str(out / "cells" / f"{cell.name}-{key[:8]}")
    assert config.eval is not None
    tokens = None  # a cache that the config names is of one budget and one selector
    if cached:
        data = config.data.model_dump(exclude={"cache"})
        tokens = str(out / "tokens" / digest([untrained_inputs(config), data, config.zip.model_dump()]))
    update["data"] = config.data.model_copy(update={"cache": tokens})
    update["eval"] = config.eval.model_copy(update={"cache": tokens})
    cell.config = config.model_copy(update=update)


def untrained_inputs(config: RunConfig) -> list[Any]:
    """What an answer of the untrained model depends on, besides the visual tokens that are kept."""
    assert config.eval is not None
    layout = config.data.model_dump(include={"template", "max_length", "pad_images", "frames"})
    return [
        config.model.model_dump(),
        config.eval.model_dump(exclude={"compare", "cache"}),
        layout,
        file_stamps(config),
    ]


def file_stamps(config: RunConfig) -> list[Any]:
    """Sizes and times of the model's and the data's files: a retrained model is another one under the same name."""
    assert config.eval is not None
    sources = [source.path for source in [*config.data.sources, *config.eval.sources]]
    paths = [*sorted(Path(config.model.path).glob("*.safetensors")), *map(Path, sources)]
    return [
        [str(path), found.st_size, found.st_mtime_ns] for path in paths if path.is_file() and (found := path.stat())
    ]
