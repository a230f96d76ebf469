"""`visionzip budget` and `eval.budgets`: accuracy and cost against tokens, from one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.workspace import config_of, make_workspace
from train import report
from train.budget_curve import Point, default_budgets, mark_knee, render_points, spaced
from train.compare import compare_models
from train.config import ConfigError, parse_config
from visionzip import ZipConfig, load
from visionzip.cli import main


def points(*pairs: tuple[int, float]) -> list[Point]:
    return [
        Point(str(tokens), tokens, right, 0.01, tokens / 1e4, tokens / 1e3, 1000 * tokens) for tokens, right in pairs
    ]


@pytest.mark.parametrize(
    ("pairs", "knee"),
    [
        ([(8, 0.5), (16, 0.7), (32, 0.78), (64, 0.8), (128, 0.81)], 32),
        ([(8, 0.5), (16, 0.7), (32, 0.6), (64, 0.72), (128, 0.73)], 16),  # a dip is noise
        ([(8, 0.8), (16, 0.8), (32, 0.805), (64, 0.79)], 8),  # nothing is won
        ([(8, 0.1), (16, 0.1), (32, 0.9), (64, 0.9)], 32),
        ([(8, 0.1)], 8),
    ],
)
def test_the_knee(pairs: list[tuple[int, float]], knee: int) -> None:
    marked = mark_knee(points(*pairs))
    assert [point.tokens for point in marked if point.knee] == [knee]
    assert f"Knee: {knee} tokens per image" in render_points(marked)
    assert mark_knee([]) == []


def test_labels_of_an_axis_do_not_touch() -> None:
    assert spaced([8, 9, 16, 32, 33, 256]) == [8, 16, 32, 256]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("budget"))


def test_the_budgets_that_are_asked_where_nobody_names_any(place: Path) -> None:
    def found(**config: object) -> list[str]:
        model, _ = load(place / "model", "cpu", config=ZipConfig(**config))
        return default_budgets(model, 16)

    assert found(budgets=[4, 8, "9+3"], dominant=5, contextual=3) == ["3+1", "7+1", "9+3", "all"]
    assert found(budgets={"least": 2, "most": 16}, dominant=5, contextual=0) == [
        "2",
        "3",
        "4",
        "5",
        "7",
        "9",
        "12",
        "16",
        "all",
    ]
    assert found(dominant=5, contextual=3) == ["2", "3", "4", "5", "7", "8", "all"]


def asked_of(place: Path) -> list[str]:
    """The command line about the model and the questions there."""
    files = [str(place / "model"), str(place / "heldout.json"), "--images", str(place / "images")]
    return ["budget", *files, "--device", "cpu"]


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        "--budgets",
        "4,5+3,all",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "b.json"),
        "--plot",
        str(tmp_path / "b.png"),
    ]
    assert main([*asked_of(place), "--max-new-tokens", "3", *more]) == 0
    out = capsys.readouterr().out
    rows = [line.split("|")[1:4] for line in out.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row[:2]] for row in rows[1:]] == [["4", "4"], ["5+3", "8"], ["all", "16"]]
    found = json.loads((tmp_path / "b.json").read_text())["points"]
    caches = [point["cache"] for point in found]
    assert caches[1] - caches[0] == 4 / 8 * (caches[2] - caches[1]), "keys and values grow with the tokens"
    assert all(0 < point["prefill"] < point["first"] for point in found)
    assert (tmp_path / "b.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--budgets", "4,x"], "'x' is not a budget"),
        (["--budgets", "4,99"], "can't be met"),
        (["--metric", "nope"], "no metric is called 'nope'"),
        (["--plot", "x.jpg"], "expected the name of a PNG file"),
    ],
)
def test_what_can_not_be_asked(changes: list[str], says: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*asked_of(place), *changes]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert says in err[-1]


def test_an_evaluation_at_several_budgets_is_what_each_gives_alone(place: Path, tmp_path: Path) -> None:
    held_out = {
        "sources": [{"path": str(place / "heldout.json"), "images": str(place / "images")}],
        "max_new_tokens": 3,
    }

    def answers(**changes: object) -> dict[str, list[str]]:
        plain = config_of(place, tmp_path / "run", **changes)
        results, _ = compare_models(parse_config(plain))
        return {name: [row["answer"] for row in scores.answers] for name, scores in results.items()}

    several = answers(eval={**held_out, "budgets": [4, "9+3"]})
    for budget, (dominant, contextual) in {"4": (3, 1), "9+3": (9, 3)}.items():
        alone = answers(eval=held_out, zip={"dominant": dominant, "contextual": contextual})
        assert several[f"training_free@{budget}"] == alone["training_free"]
        assert several["full"] == alone["full"]
    with pytest.raises(ConfigError, match="the list of budgets is empty"):
        parse_config(config_of(place, tmp_path / "run", eval={**held_out, "budgets": []}))
    with pytest.raises(ConfigError, match="'x' is not a budget"):
        parse_config(config_of(place, tmp_path / "run", eval={**held_out, "budgets": ["x"]}))


def test_a_report_has_the_budgets() -> None:
    from train.scores import Scores, describe_scores

    found = {"fine_tuned": Scores({"a": (3, 4)}), "fine_tuned@4": Scores({"a": (2, 4)})}
    assert report.summarize_results(found, 8, 16, 0, 5)["budgets"] == {"4": 0.5}
    assert "| 4 | 50.0 % |" in describe_scores(found, 8, 16)
    assert "budgets" not in report.summarize_results({"fine_tuned": found["fine_tuned"]}, 8, 16, 0, 5)
