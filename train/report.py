"""`report/`: what a run did, to look at. Loss curve, accuracy bars and kept patches as PNG; table and results as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from train.config import RunConfig
from train.held_out import one_a_picture, picture_inputs, questions_of
from train.scores import LABELS, Scores, describe_scores
from visionzip import attached

# Okabe and Ito's palette: told apart by people who see red and green alike.
COLOURS = {"full": "#0072B2", "training_free": "#E69F00", "fine_tuned": "#009E73"}


def results(scores: dict[str, Scores], tokens: int, of_tokens: int, seed: int, trainable: int) -> dict[str, Any]:
    """The content of `results.json`; accuracies are fractions, what was not measured is left out."""
    return {
        **{name: scores[name].accuracy for name in LABELS if name in scores},
        "tokens": tokens,
        "of_tokens": of_tokens,
        "ran_on": {name: found.ran_on / found.questions for name, found in scores.items() if found.questions},
        "questions": max((s.questions for s in scores.values()), default=0),
        "seed": seed,
        "trainable_parameters": trainable,
        "by_type": {
            name: {kind: right / asked for kind, (right, asked) in sorted(s.types.items())}
            for name, s in scores.items()
        },
    }


def write(
    folder: str | Path, config: RunConfig, scores: dict[str, Scores], facts: dict[str, Any], log: list[dict[str, Any]]
) -> list[Path]:
    """Everything that needs no model. `facts` is `results()`. Returns the pictures."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    if any("loss" in line for line in log):
        pictures.append(loss_curve(folder / "loss.png", log))
    if scores:
        (folder / "table.md").write_text(f"{describe_scores(scores, facts['tokens'], facts['of_tokens'])}\n")
        with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
            for name, result in scores.items():
                file.writelines(json.dumps({"model": name, **row}) + "\n" for row in result.answers)
        pictures.append(accuracy_bars(folder / "accuracy.png", scores, facts))
    # Last: where it is, the rest is complete (train.sweep takes it for the end of a cell).
    (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    return pictures


def loss_curve(path: Path, log: list[dict[str, Any]]) -> Path:
    plt = _pyplot()
    points = [(line["step"], line["loss"]) for line in log if "loss" in line]
    steps, losses = np.array(points).T
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(steps, losses, color="#999999", linewidth=0.8, label="each log line")
    window = max(1, len(losses) // 25)
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=COLOURS["full"], linewidth=2, label=f"mean of {window} log lines")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", title="Training loss")
    return _save(figure, path)


def accuracy_bars(path: Path, scores: dict[str, Scores], facts: dict[str, Any]) -> Path:
    plt = _pyplot()
    names = [name for name in LABELS if name in scores]
    types = sorted({kind for name in names for kind in scores[name].types})
    kinds = [*types, "all questions"] if len(types) > 1 else ["all questions"]
    figure, axes = plt.subplots(figsize=(max(5.0, 1.3 * len(kinds) + 2.5), 4))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        result = scores[name]
        values = [
            100 * (result.accuracy if kind == "all questions" else _share(result.types.get(kind, (0, 0))))
            for kind in kinds
        ]
        tokens = facts["of_tokens"] if name == "full" else facts["tokens"]
        bars = axes.bar(np.arange(len(kinds)) + (place - (len(names) - 1) / 2) * width, values, width,
                        color=COLOURS[name], label=f"{LABELS[name]} ({tokens} tokens)" if name != "full" else
                        f"full ({tokens} tokens)")  # fmt: skip
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(ylabel="exact match, %", ylim=(0, 118), title=f"Held-out questions ({facts['questions']})")
    axes.legend(frameon=False, ncols=len(names), loc="upper center", fontsize=8)
    return _save(figure, path)


def kept_patches(folder: str | Path, model: Any, processor: Any, config: RunConfig) -> list[Path]:
    """A few held-out pictures as the library draws them: attention, the patches kept, what was merged into which token.

    One file a picture; of a tiled one the last tile (`visionzip visualize` draws all of them).
    """
    from visionzip.analysis import draw
    from visionzip.analysis.trace import trace_inputs
    from visionzip.analysis.visualize import note, views

    attachment = attached(model)
    if attachment is None or not config.report.pictures:
        return []
    paths: list[Path] = []
    for question in one_a_picture(questions_of(config, processor), config.report.pictures):
        tile = trace_inputs(attachment, processor, picture_inputs(question)).tiles[-1]
        path = Path(folder) / f"kept_{len(paths)}.png"
        draw.panel(views(tile, 320), question.id.rsplit("/", 1)[0], note(tile)).save(path)
        paths.append(path)
    return paths


def _share(pair: tuple[float, int]) -> float:
    return pair[0] / pair[1] if pair[1] else 0.0


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    return plt


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
    return path
