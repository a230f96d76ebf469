"""One projector for every budget against a specialist for each, on the embedded model.

    python -m scripts.elastic --out runs/elastic --jobs 2

Trains, for each seed, a specialist at each budget of `zip.budgets` in CONFIG and one projector for all of them, from one token
cache, the latter for as many steps as bring it to `--cost` times the LLM tokens of one specialist (their mean). Then the held-out questions are
asked at all budgets, of which `--unseen` were never trained on: training-free, every specialist at every budget, the one
projector. What is there already is not done again. Prints the table of docs/results.md; OUT has elastic.json and elastic.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.elastic import Budget, BudgetDraw
from scripts.bad_input import exit_code_of
from train.config import RunConfig, load_config
from visionzip.budgets import at_budget, ladder, split_total

if TYPE_CHECKING:
    from train.tasks import Task

CONFIG = "configs/tiny-llava/elastic.yaml"
ONE = "one projector"
FREE = "training-free"


def settings(args: argparse.Namespace, *overrides: str) -> RunConfig:
    """The config with this command's paths. `overrides` come last."""
    data = args.data
    return load_config(
        args.config,
        [
            f"data.cache={args.out / 'tokens'}",
            f"data.sources.0.path={data}/train.json",
            f"data.sources.0.images={data}/images",
            f"eval.sources.0.path={data}/eval.json",
            f"eval.sources.0.images={data}/images",
            f"eval.cache={args.out / 'tokens'}",
            *args.overrides,
            *overrides,
        ],
    )


def written(budget: Budget) -> str:
    return f"{budget[0]}+{budget[1]}"


def all_budgets(args: argparse.Namespace) -> list[Budget]:
    """Trained and unseen ones, by size."""
    config = settings(args).zip
    unseen = [split_total(int(total), config) for total in args.unseen.split(",") if total]
    return sorted([*ladder(config), *unseen], key=sum)


def fill_cache(config: RunConfig) -> int:
    """Tokens of training and held-out images at all budgets."""
    from train.sweep_runner import make_tokens

    return make_tokens(config)


def train_only(config: RunConfig) -> int:
    """A run without its own evaluation: all projectors are evaluated at once, afterwards."""
    from train.run import run

    return run(config.model_copy(update={"eval": None}))


def count_llm_tokens(config: RunConfig, steps: int) -> int:
    """Tokens that go through the LLM in a run's first `steps` steps; no padding, and text anew for each budget of a sample."""
    from data.dataset import build_dataset
    from data.partial import load_processor

    dataset = build_dataset(config.data, load_processor(config.model), config.seed)
    order, draw = dataset.sampler(1), BudgetDraw(config.zip, config.seed, config.train.budgets_per_sample)
    smallest = sum(ladder(settings_of_cache(config))[0])
    text: dict[int, int] = {}
    total, left, epoch = 0, steps * (config.trainer.global_batch_size or 0), 0
    while left > 0:
        indices = order.order(epoch)[:left].tolist()
        for index, budgets in zip(indices, draw(epoch, 0, len(indices)), strict=True):
            if index not in text:  # without a budget the cache is read at its smallest
                item: Any = dataset[index]
                text[index] = len(item["input_ids"]) - smallest
            total += sum(text[index] + int(sum(budget)) for budget in budgets)
        left -= len(indices)
        epoch += 1
    return total


def settings_of_cache(config: RunConfig) -> Any:
    """The `ZipConfig` that the cache of `config` was made with."""
    from data.cache.identity import MANIFEST
    from visionzip import ZipConfig

    stored = json.loads((Path(config.data.cache or "") / MANIFEST).read_text())["zip"]
    budgets = [f"{dominant}+{contextual}" for dominant, contextual in stored["budgets"]]
    return ZipConfig.model_validate({"dominant": 1, "contextual": stored["budgets"][-1][1], "budgets": budgets})


def steps_for(config: RunConfig, target: int) -> tuple[int, int]:
    """The most steps whose LLM tokens are at most `target`, and their tokens."""
    low, high = 1, 4 * config.trainer.max_steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_llm_tokens(config, middle) <= target else (low, middle - 1)
    return low, count_llm_tokens(config, low)


def runs_of(args: argparse.Namespace) -> tuple[dict[tuple[str, int], RunConfig], dict[str, int]]:
    """(who, seed) → config, and LLM tokens by who, of the first seed."""
    base = settings(args)
    found: dict[tuple[str, int], RunConfig] = {}
    tokens: dict[str, int] = {}
    for budget in ladder(base.zip):
        name = f"specialist {written(budget)}"
        for seed in args.seeds:
            fixed = [f"zip.dominant={budget[0]}", f"zip.contextual={budget[1]}", "zip.budgets=null", f"seed={seed}"]
            found[name, seed] = settings(args, *fixed, f"output_dir={args.out / f'{written(budget)}-{seed}'}")
        tokens[name] = count_llm_tokens(found[name, args.seeds[0]], base.trainer.max_steps)
    target = round(args.cost * statistics.mean(tokens.values()))
    steps, tokens[ONE] = steps_for(base, target)
    variant = "-".join(
        [f"one-{args.cost:g}x", *(re.sub(r"[^\w.+=]+", "-", override).strip("-") for override in args.one)]
    )
    for seed in args.seeds:
        folder = f"output_dir={args.out / f'{variant}-{seed}'}"
        found[ONE, seed] = settings(args, f"seed={seed}", f"trainer.max_steps={steps}", *args.one, folder)
    return found, tokens


def ask_at_budgets(config: RunConfig, path: str | None, budgets: Sequence[Budget], answers: Path) -> int:
    """Add to `answers` (JSON: budget → share of right answers) those that are missing; `path` is a run, None no training."""
    from contextlib import ExitStack

    from train.build import build_model
    from train.held_out import score_model
    from visionzip import attach, detach
    from visionzip.export import loaded_into

    found: dict[str, float] = json.loads(answers.read_text()) if answers.exists() else {}
    model, processor = build_model(config)
    if path is None and "all" not in found:
        detach(model)
        found["all"] = score_model(model, processor, config).accuracy
    for budget in budgets:
        if written(budget) in found:
            continue
        attach(model, processor, at_budget(config.zip, budget))
        with ExitStack() as loaded:
            if path is not None:
                loaded.enter_context(loaded_into(model, path, force=True))
            found[written(budget)] = score_model(model, processor, config).accuracy
        answers.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{written(budget)}: {100 * found[written(budget)]:.1f} %", flush=True)
    return 0


def evaluate_all(
    args: argparse.Namespace, runs: dict[tuple[str, int], RunConfig], tell: Callable[[Task, int, float], None]
) -> dict[str, Any] | None:
    """Right answers (share): who → budget → seed → share. A specialist whose seed is not among `--away` is asked at home only."""
    from train.tasks import Task, run_all

    config, everywhere = settings(args), all_budgets(args)
    files: dict[tuple[str, int], Path] = {}
    tasks = []
    for (who, seed), path in {(FREE, 0): None, **{key: run.output_dir for key, run in runs.items()}}.items():
        folder = Path(path) if path else args.out
        files[who, seed] = folder / "answers.json"
        asked = [b for b in everywhere if who in (FREE, ONE) or seed in args.away or who == f"specialist {written(b)}"]
        ask = partial(ask_at_budgets, path=path, budgets=asked, answers=files[who, seed])
        tasks.append(Task(f"{who}, seed {seed}, answers", ask, config, folder / "answers.log"))
    if run_all(tasks, args.jobs, tell):
        return None
    found: dict[str, Any] = {}
    for (who, seed), file in files.items():
        for budget, share in json.loads(file.read_text()).items():
            found.setdefault(who, {}).setdefault(budget, {})[str(seed)] = share
    return found


def percent(values: dict[str, float]) -> str:
    mean = f"{100 * statistics.mean(values.values()):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values.values()):.1f}" if len(values) > 1 else mean


def render_table(args: argparse.Namespace, found: dict[str, Any], tokens: dict[str, int]) -> str:
    """A row for each budget: training-free, its specialist, the one projector, and the specialists of other budgets."""
    trained = [written(budget) for budget in ladder(settings(args).zip)]
    lines = [
        "| tokens | training-free | its specialist | one projector | one − its specialist | best of the other specialists | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    means: list[float] = []
    for budget in all_budgets(args):
        name = written(budget)
        one = found[ONE][name]
        means.append(statistics.mean(one.values()))
        others = {
            who: 100 * statistics.mean(answers.values())
            for who in trained
            if who != name and (answers := found[f"specialist {who}"].get(name))
        }
        ranked = [f"{others[who]:.1f} (of {who})" for who in sorted(others, key=others.__getitem__)] or ["–"]
        own = found[f"specialist {name}"][name] if name in trained else None
        behind = ""
        if own is not None:
            differences = [100 * (one[seed] - own[seed]) for seed in one]
            behind = f"{statistics.mean(differences):+.1f}"
        lines.append(
            f"| {sum(budget)}{'' if own else ' (never trained on)'} | {percent(found[FREE][name])} | {percent(own) if own else '–'} | "
            f"{percent(one)} | {behind or '–'} | {ranked[-1]} | {ranked[0]} |"
        )
    rising = all(after >= before for before, after in itertools.pairwise(means))
    counted = ", ".join(f"{who.removeprefix('specialist ')} {count:,}" for who, count in tokens.items())
    full = found[FREE]["all"]["0"]
    lines += ["", f"Full tokens: {100 * full:.1f} %. LLM tokens of a training run: {counted}.",
              f"The one projector {'rises' if rising else 'does not rise everywhere'} with the budget."]  # fmt: skip
    return "\n".join(lines)


def draw(args: argparse.Namespace, found: dict[str, Any], path: Path) -> None:
    """Accuracy against tokens: everyone at every budget."""
    from visionzip.analysis.style import (
        BLUE,
        QUIET,
        VERMILION,
        legend_beside,
        new_figure,
        save_figure,
        set_title,
        style,
    )

    budgets = all_budgets(args)
    totals = [sum(budget) for budget in budgets]

    def line(who: str) -> list[float]:
        return [100 * statistics.mean(found[who][written(budget)].values()) for budget in budgets]

    with style():
        figure, axes = new_figure(8.4, 4.6)
        specialists = [f"specialist {written(budget)}" for budget in ladder(settings(args).zip)]
        away = [who for who in specialists if len(found[who]) == len(budgets)]
        for number, who in enumerate(away):
            axes.plot(
                totals, line(who), color=QUIET, linewidth=1, label="a specialist away from home" if not number else None
            )
        home = [(sum(b), found[f"specialist {written(b)}"][written(b)]) for b in ladder(settings(args).zip)]
        axes.plot(
            [n for n, _ in home],
            [100 * statistics.mean(v.values()) for _, v in home],
            "o",
            color=VERMILION,
            label="a specialist at home",
        )
        axes.plot(totals, line(FREE), color=QUIET, linestyle="--", label=FREE)
        axes.plot(totals, line(ONE), color=BLUE, linewidth=2.2, marker="s", label=ONE)
        axes.set_xscale("log")
        axes.set_xticks(totals, [str(total) for total in totals])
        axes.minorticks_off()
        axes.set(xlabel="visual tokens per image", ylabel="exact match, %")
        legend_beside(figure, axes)
        set_title(
            figure, "One projector for every budget", f"{Path(settings(args).model.path).name}, {len(args.seeds)} seeds"
        )
        save_figure(figure, path)


def parse_seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",") if seed]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.elastic", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--out", type=Path, default=Path("runs/elastic"))
    parser.add_argument(
        "--data", type=Path, help="folder of train.json, eval.json and images/ (default: drawn shapes, made in OUT)"
    )
    parser.add_argument("--unseen", default="12,40", help="budgets that nothing is trained on (default: %(default)s)")
    parser.add_argument("--seeds", type=parse_seeds, default=[0, 1, 2])
    parser.add_argument(
        "--away",
        type=parse_seeds,
        default=[0, 1, 2],
        help="seeds whose specialists are asked at all budgets; '' for none (default: 0,1,2)",
    )
    parser.add_argument(
        "--cost", type=float, default=1, help="LLM tokens of the one projector, in specialists' (default: 1)"
    )
    parser.add_argument(
        "--one", action="append", default=[], metavar="KEY=VALUE", help="override for the one projector alone"
    )
    parser.add_argument("--train", type=int, default=1280, help="training images of the data set that is made")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("overrides", nargs="*", help="key=value, for all runs")
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    from train.tasks import Task, run_all

    everywhere = ",".join(f'"{written(budget)}"' for budget in all_budgets(args))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        args.data = args.out / "data"
    if not args.data.exists():
        made = ["-m", "data.shapes", "--out", str(args.data), "--train", str(args.train)]
        subprocess.run([sys.executable, *made], check=True)

    def tell(task: Task, code: int, seconds: float) -> None:
        print(
            f"{task.name}: {'done' if not code else f'failed ({code}), see {task.log}'} ({seconds:.0f} s)",
            file=sys.stderr,
        )

    if not (args.out / "tokens" / "complete").exists():
        cache = settings(args, f"zip.budgets=[{everywhere}]")
        if run_all([Task("tokens", fill_cache, cache, args.out / "tokens.log")], 1, tell):
            return 1
    runs, tokens = runs_of(args)
    missing = [
        Task(f"{who}, seed {seed}", train_only, config, Path(config.output_dir) / "log.txt")
        for (who, seed), config in runs.items()
        if not (Path(config.output_dir) / "projector").is_dir()
    ]
    if run_all(missing, args.jobs, tell):
        return 1
    found = evaluate_all(args, runs, tell)
    if found is None:
        return 1
    facts = {"accuracy": found, "llm_tokens": tokens, "seeds": args.seeds}
    (args.out / "elastic.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(args, found, args.out / "elastic.png")
    print(render_table(args, found, tokens))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
