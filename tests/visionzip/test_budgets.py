"""One parser and one splitter of budgets, the same in every command."""

import itertools

import pytest

from visionzip import ZipConfig
from visionzip.budgets import (
    as_config,
    at_budget,
    contextual_for,
    format_budget,
    is_trained,
    ladder,
    parse_budget,
    parse_budgets,
    split_total,
    weights,
)
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


@pytest.mark.parametrize("text", ["64", " 54 + 10 ", "10%", ".1"])
def test_a_config_reads_a_budget_as_the_command_line_does(text):
    (size,) = ZipConfig(budgets=[text]).budgets.sizes()
    assert as_config(size, ZipConfig()) == parse_budget(text, ZipConfig())


@pytest.mark.parametrize("text", ["5 4", "1+2+3", "0.1+0.05", "all", "300%", "٣"])
def test_what_is_no_budget_of_a_config(text):
    with pytest.raises(ValueError, match="is not a budget"):
        ZipConfig(budgets=[text])


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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [(54, 10)]),
        ({"budgets": [8, "11+5", 32, 64]}, [(7, 1), (11, 5), (27, 5), (54, 10)]),
        ({"budgets": [8, 64], "dominant": 50, "contextual": 14}, [(7, 1), (54, 10)]),
        ({"budgets": [8, 64], "contextual": 0}, [(8, 0), (64, 0)]),
        ({"budgets": {"least": 2, "most": 4}}, [(2, 0), (3, 0), (3, 1)]),
        ({"budgets": [0.1, 0.64]}, [(0.084375, 0.015625), (0.54, 0.1)]),
        ({"budgets": [0.1], "contextual": 0.0}, [(0.1, 0.0)]),
    ],
)
def test_the_budgets_that_a_projector_is_trained_for(fields, expected):
    config = ZipConfig(**fields)
    assert [pytest.approx(rung) for rung in expected] == ladder(config)
    assert len(weights(config)) == len(expected)
    assert sum(weights(config)) == pytest.approx(1)
    for rung in ladder(config):
        changed = at_budget(config, rung)
        assert (changed.dominant, changed.contextual, changed.budgets) == (*rung, config.budgets)
        assert ladder(changed) == ladder(config)


def test_small_budgets_are_drawn_more_often():
    found = weights(ZipConfig(budgets={"least": 1, "most": 100}))
    assert found == pytest.approx(
        [2 / 100 - 2 * (place + 0.5) / 100**2 for place in range(100)]
    )  # 2 - 2x at each middle
    assert weights(ZipConfig(budgets={"least": 1, "most": 4, "density": [1]})) == pytest.approx([0.25] * 4)
    assert weights(ZipConfig(budgets={"totals": [4, 8], "density": [0.9, 0.1]})) == [0.9, 0.1]
    assert weights(ZipConfig(budgets=[4, 8])) == [0.5, 0.5]


def test_a_budget_between_two_trained_ones_is_trained():
    elastic = ZipConfig(budgets=[8, 16, 64])
    assert [is_trained(elastic, split_total(total)) for total in (7, 8, 9, 64, 65)] == [False, True, True, True, False]
    nested = ZipConfig(budgets=[8, 64], contextual=0)
    assert is_trained(nested, (20, 0))
    assert not is_trained(nested, (16, 4)), "it never saw a merged token"
    assert parse_budget("20", nested).contextual == 0
    fixed = ZipConfig(dominant=13, contextual=3)
    assert is_trained(fixed, (13, 3))
    assert not is_trained(fixed, (12, 4))
    assert is_trained(ZipConfig(budgets=[0.1, 0.3]), (54, 10)), "tokens and shares are not compared"


def test_the_names_that_help_lists_are_the_registered_ones():
    assert registered_names("selector") == SELECTORS.names()
    assert registered_names("merge") == MERGES.names()
