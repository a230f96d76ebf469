"""What answers are worth, what is said of them and of the loss where something looks wrong, and how a metric is added."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.train.workspace import Ranks, config_of
from train.config import ConfigError, parse_config
from train.held_out import merge_answers, score_answer
from train.metrics import METRICS
from train.report import summarize_results as facts_of
from train.result_checks import check_answers, check_loss
from train.scores import Scores, describe_ran_on, describe_scores, runs_on
from visionzip.words import count_of


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ("top left left left", "top left", True),
        ("Top left. Left.", "top left", False),  # another sentence is another answer
        ("top  left\nleft", "top left.", True),
        ("top left", "top left", False),
        ("Top left.", "top left", False),
        ("top lefty", "top left", False),
        ("bottom left", "top left", False),
        ("", "top left", False),
    ],
)
def test_a_right_answer_that_does_not_stop(answer: str, expected: str, found: bool) -> None:
    assert runs_on(answer, expected) is found


def scored(*answers: str, metric: str = "exact_match") -> Scores:
    """Of a model that gives these answers to questions whose answer is "top left"."""
    question = SimpleNamespace(id="r/0", type="where", question="where is it", answer="top left")
    return merge_answers({number: score_answer(question, answer, metric) for number, answer in enumerate(answers)}, 1)


def test_it_counts_as_wrong_and_is_reported_beside_the_accuracy() -> None:
    free, tuned = scored("top left", "top left left", "red", "blue"), scored("top left", "Top left.", "red", "blue")
    assert (free.accuracy, free.ran_on) == (0.25, 1)
    found = {"training_free": free, "fine_tuned": tuned}
    assert describe_ran_on(found) == "Right but ran on, counted as wrong: training-free 25.0 %, fine-tuned 0.0 %."
    assert describe_scores(found, 16, 81).endswith(describe_ran_on(found))
    assert facts_of(found, 16, 81, 0, 5)["ran_on"] == {"training_free": 0.25, "fine_tuned": 0.0}
    assert describe_ran_on({"fine_tuned": tuned}) == ""


@pytest.fixture
def half_right() -> Any:
    @METRICS.register("half right")
    def half_right(answer: str, expected: str) -> float:
        return 0.5

    yield half_right
    del METRICS._entries["half right"]


def test_a_metric_is_a_function_and_a_registration(workspace: Path, tmp_path: Path, half_right: Any) -> None:
    sources = [{"path": str(workspace / "heldout.json")}]
    config = parse_config(config_of(workspace, tmp_path, eval={"sources": sources, "metric": "half right"}))
    assert config.eval is not None
    assert scored("red", "top left", "top left left", metric=config.eval.metric).accuracy == 0.5
    with pytest.raises(ValueError, match="the metric 'half right' is registered twice"):
        METRICS.register("half right")(half_right)
    with pytest.raises(ConfigError, match=r"eval\.metric: there is no metric 'nope'; there are exact_match"):
        parse_config(config_of(workspace, tmp_path, eval={"sources": sources, "metric": "nope"}))


def test_answers_that_are_all_wrong_are_shown() -> None:
    said = check_answers("fine-tuned", scored("red", "red red", "blue", "green"))
    assert said.splitlines()[0] == "warning: every answer is wrong (fine-tuned). The first ones:"
    assert said.splitlines()[1:] == [
        f"  'where is it': expected 'top left', answered {answer!r}" for answer in ("red", "red red", "blue")
    ]
    assert check_answers("fine-tuned", scored("red", "top left")) == ""
    assert check_answers("fine-tuned", Scores()) == ""


def log(losses: Any) -> list[dict[str, Any]]:
    return [
        *({"step": step, "loss": float(loss)} for step, loss in enumerate(losses)),
        {"step": 99, "train_runtime": 1.0},
    ]


def test_a_loss_that_does_not_fall() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 40)
    assert check_loss(log(2 + noise)).startswith("warning: the loss did not fall: 2.0")
    assert check_loss(log(2 + noise + np.linspace(0, 5, 40)))
    assert check_loss(log([2.0] * 40))
    assert check_loss(log(2 + noise - np.linspace(0, 0.5, 40))) == ""
    assert check_loss(log([2.0] * 11)) == "", "too few to say"


@pytest.mark.launch
def test_a_run_with_a_useless_learning_rate_says_so(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    evaluated = {
        "sources": [{"path": str(workspace / "heldout.json"), "images": str(workspace / "images")}],
        "max_new_tokens": 3,
        "compare": [],
    }
    changes = {
        "eval": evaluated,
        "trainer__deepspeed": "off",
        "trainer__max_steps": 12,
        "trainer__lr_scheduler_type": "constant",
    }
    useless = config_of(workspace, tmp_path / "useless", trainer__learning_rate=1e-12, **changes)
    said = ranks.run(useless, world=1)
    assert "warning: the loss did not fall: " in said
    assert "warning: every answer is wrong (fine-tuned). The first ones:\n  'what is this" in said
    good = ranks.run(config_of(workspace, tmp_path / "good", trainer__learning_rate=1e-2, **changes), world=1)
    assert "the loss did not fall" not in good


def test_numbers_and_their_words() -> None:
    assert [count_of(n, w) for n, w in ((1, "record"), (2, "record"), (0, "cell"), (3, "process"))] == [
        "1 record", "2 records", "0 cells", "3 processes",
    ]  # fmt: skip
    assert count_of(4000, "sample") == "4,000 samples"
