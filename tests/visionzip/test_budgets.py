"""One parser and one splitter of budgets, the same in every command."""

import itertools

import pytest

from visionzip import ZipConfig
from visionzip.budgets import contextual_for, format_budget, parse_budget, parse_budgets, split_total
from visionzip.commands._model import registered_names
from visionzip.merges import MERGES
from visionzip.selectors import SELECTORS

OWN = ZipConfig(dominant=12, contextual=4, selector="divprune", merge="mean")


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (64, (54, 10)),
        (128, (108, 20)),
        (192, (162, 30)),
        (32, (27, 5)),
        (16, (13, 3)),
        (8, (7, 1)),
        (2, (2, 0)),
        (1, (1, 0)),
    ],
)
def test_a_total_is_split_in_the_papers_proportion(total, expected):
    assert split_total(total) == expected
    assert (
        split_total(total, ZipConfig(dominant=300, contextual=3)) == expected
    )  # another total's split is not this one's


def test_every_total_keeps_at_least_one_dominant_token_and_grows():
    splits = [split_total(total) for total in range(1, 600)]
    assert [sum(split) for split in splits] == list(range(1, 600))
    assert all(dominant >= 1 for dominant, _ in splits)
    assert all(after[0] >= before[0] and after[1] >= before[1] for before, after in itertools.pairwise(splits))


def test_the_models_own_split_of_its_total():
    assert split_total(16, OWN) == (12, 4)
    assert split_total(32, OWN) == (27, 5)
    shares = ZipConfig(dominant=0.16, contextual=0.04)
    assert split_total(0.2, shares) == (0.16, 0.04)
    assert split_total(0.1, shares) == pytest.approx((0.084375, 0.015625))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", (54, 10)),
        (" 64 ", (54, 10)),
        ("16", (12, 4)),
        ("16+3", (16, 3)),
        ("8 + 0", (8, 0)),
        ("0.2+0.05", (0.2, 0.05)),
        ("20%+5%", (0.2, 0.05)),
        ("0.64", (0.54, 0.1)),
        (".64", (0.54, 0.1)),
        ("64%", (0.54, 0.1)),
        ("1.0", (0.84375, 0.15625)),
    ],
)
def test_what_can_be_written(text, expected):
    budget = parse_budget(text, OWN)
    assert (budget.dominant, budget.contextual) == pytest.approx(expected)
    assert [type(value) for value in (budget.dominant, budget.contextual)] == [type(value) for value in expected]
    assert (budget.selector, budget.merge) == ("divprune", "mean")


@pytest.mark.parametrize(
    "text", ["", "x", "1+2+3", "0", "0+3", "-5", "2.5", "+", "13+", "1e3", "300%", "nan", "1_6", "٣"]
)
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match="is not a budget") as error:
        parse_budget(text, OWN)
    assert "\n" not in str(error.value)


def test_lists():
    assert parse_budgets("all, full,64,27+5") == [
        None,
        None,
        ZipConfig(dominant=54, contextual=10),
        ZipConfig(dominant=27, contextual=5),
    ]
    assert [format_budget(budget) for budget in parse_budgets("all,16")] == ["all", "13 + 3"]


def test_contextual_tokens_to_go_with_another_number_of_dominant_ones():
    paper = ZipConfig(dominant=54, contextual=10)
    assert [contextual_for(dominant, paper) for dominant in (108, 27, 2, 0.54)] == [20, 5, 1, pytest.approx(0.1)]
    assert contextual_for(6, OWN) == 2
    assert contextual_for(6, ZipConfig(dominant=54, contextual=0)) == 0
    assert contextual_for(27, ZipConfig(dominant=0.16, contextual=0.04)) == 5


def test_the_names_that_help_lists_are_the_registered_ones():
    assert registered_names("selector") == SELECTORS.names()
    assert registered_names("merge") == MERGES.names()
