"""run a config over selectors, budgets, seeds and other keys, and compare the results

  visionzip sweep --config configs/tiny-llava/sweep.yaml --out runs/sweep selector=visionzip,divprune budget=8,16 seed=0,1,2

`selector`, `budget` and `seed` are axes; so is any key of the config with several values
(`trainer.learning_rate=1e-3,3e-3`); other `key=value` arguments override the file, as for `train.py`. A budget is a number of tokens, split
as in the config's budget if that has the same total, else as in the paper (16 is 13+3), or both numbers (`budget=13+3`).

Visual tokens of training and held-out images are computed once per selector and budget and read by all cells. Full tokens are
evaluated once, training-free ones once per selector and budget. The same command runs the missing cells: finished cells are
kept, and a changed config, model or data file makes new ones. `--preset selectors` is every selector and control with three seeds;
an axis that is given as well replaces the preset's. Each row also says what a prompt costs: visual tokens averaged over the LLM's
layers, floating-point operations, and the size of the visual tokens' keys and values. In OUT: `sweep.md`, `sweep.json`, `sweep.png`, `cells/`, `tokens/`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from train.commands import _config
from train.guard import run_guarded
from train.sweep_cells import PRESETS, make_cells, preset_axes
from visionzip.argument_types import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _config.add_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder of the sweep")
    parser.add_argument(
        "--jobs", type=at_least(1), default=1, help="cells run at once, each in its own process (default: %(default)s)"
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="axes with their usual values")
    parser.add_argument("--pixels", action="store_true", help="compute visual tokens in every run instead of once")


def run(arguments: argparse.Namespace) -> int:
    return run_guarded(lambda: sweep(arguments))


def sweep(arguments: argparse.Namespace) -> int:
    items = [*preset_axes(arguments.preset, arguments.overrides), *arguments.overrides]
    cells = make_cells(arguments.config, arguments.out, items, cached=not arguments.pixels)
    from train import sweep_runner

    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "command.txt").write_text(f"{shlex.join(sys.argv)}\n")
    return sweep_runner.run_sweep(arguments.out, cells, arguments.jobs)
