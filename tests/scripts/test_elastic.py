"""The comparison of one projector with specialists: what its table says, and how many steps the one projector gets."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from scripts import elastic


@pytest.fixture
def args() -> Namespace:
    return Namespace(
        config=elastic.CONFIG, data=Path("data"), out=Path("out"), overrides=["zip.budgets=[8,16]"], unseen="12", seeds=[0, 1]
    )  # fmt: skip


def test_the_table(args: Namespace) -> None:
    found = {
        "training-free": {"all": {"0": 0.97}, "7+1": {"0": 0.40}, "10+2": {"0": 0.45}, "13+3": {"0": 0.50}},
        "one projector": {
            "7+1": {"0": 0.58, "1": 0.60},
            "10+2": {"0": 0.70, "1": 0.70},
            "13+3": {"0": 0.66, "1": 0.68},
        },
        "specialist 7+1": {"7+1": {"0": 0.60, "1": 0.61}, "10+2": {"0": 0.5}, "13+3": {"0": 0.55}},
        "specialist 13+3": {"7+1": {"0": 0.30}, "10+2": {"0": 0.65}, "13+3": {"0": 0.65, "1": 0.65}},
    }
    assert elastic.all_budgets(args) == [(7, 1), (10, 2), (13, 3)]
    lines = elastic.render_table(args, found, {"specialist 7+1": 1000, "one projector": 2000}).splitlines()
    assert lines[2] == "| 8 | 40.0 | 60.5 ± 0.7 | 59.0 ± 1.4 | -1.5 | 30.0 (of 13+3) | 30.0 (of 13+3) |"
    assert lines[3] == "| 12 (never trained on) | 45.0 | – | 70.0 ± 0.0 | – | 65.0 (of 13+3) | 50.0 (of 7+1) |"
    assert lines[4] == "| 16 | 50.0 | 65.0 ± 0.0 | 67.0 ± 1.4 | +2.0 | 55.0 (of 7+1) | 55.0 (of 7+1) |"
    assert "Full tokens: 97.0 %. LLM tokens of a training run: 7+1 1,000, one projector 2,000." in lines
    assert lines[-1] == "The one projector does not rise everywhere with the budget."

    found["specialist 7+1"] = {"7+1": {"0": 0.60, "1": 0.61}}
    alone = elastic.render_table(args, found, {"one projector": 2000}).splitlines()
    assert alone[4] == "| 16 | 50.0 | 65.0 ± 0.0 | 67.0 ± 1.4 | +2.0 | – | – |"


@pytest.mark.parametrize(("target", "steps"), [(1234, 12), (1300, 13), (50, 1), (10**9, 480)])
def test_as_many_steps_as_the_tokens_allow(
    args: Namespace, target: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "count_llm_tokens", lambda config, number: 100 * number)
    assert elastic.steps_for(elastic.settings(args), target) == (steps, 100 * steps)
