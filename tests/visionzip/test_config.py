"""Budgets that can't be met are refused with what would do."""

import pytest

from visionzip import ZipConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dominant": 0}, "dominant=0"),
        ({"dominant": -3}, "dominant=-3"),
        ({"contextual": -1}, "contextual=-1"),
        ({"dominant": 1.5}, "dominant=1.5"),
        ({"dominant": 0.0}, "dominant=0.0"),
        ({"contextual": -0.1}, "contextual=-0.1"),
        ({"dominant": True}, "dominant"),
        ({"dominant": "many"}, "dominant"),
        ({"merge": "sum"}, "merge"),
        ({"domnant": 3}, "domnant"),
        ({"budgets": []}, "the list of budgets is empty"),
        ({"budgets": [16, 8]}, r"\[16, 8\] are not in ascending order"),
        ({"budgets": [8, "5+3"]}, "are not in ascending order"),
        ({"budgets": [0.1, 8]}, "are not in ascending order"),
        ({"budgets": [0]}, "0 is not a budget; expected at least one token"),
        ({"budgets": ["0+5"]}, "'0\\+5' is not a budget; expected at least one token"),
        ({"budgets": [1.5]}, "1.5 is not a budget"),
        ({"budgets": ["many"]}, "'many' is not a budget; expected a number of tokens"),
        ({"budgets": {"least": 8}}, "expected a list of budgets"),
        ({"budgets": {"least": 9, "most": 8}}, "least=9, most=8 is not a range"),
        ({"budgets": {"totals": [8], "most": 8}}, "got both"),
        ({"budgets": {"totals": [8, 16], "density": [0.5, 0.4]}}, "is not a density: it sums to 0.9"),
        ({"budgets": {"totals": [8, 16], "density": [1.0]}}, "density has 1 numbers for 2 budgets"),
        ({"budgets": {"totals": [8, 16], "density": [1.5, -0.5]}}, "it is negative for some"),
        ({"budgets": {"least": 8, "most": 64, "density": [2, -1]}}, "is not a density: it sums to 1.5"),
        ({"budgets": {"least": 8, "most": 64, "density": [3, -4]}}, "it is negative for some"),
        ({"budgets": ["13+3"], "contextual": 0}, "13\\+3 has contextual tokens, but contextual=0"),
        ({"adaptive": {"threshold": 0.5}}, "adaptive: budgets that a threshold chooses for each image were removed"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ZipConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "tokens", "reserved", "expected"),
    [
        ({"dominant": 54, "contextual": 10}, 577, 1, (54, 10)),
        ({"dominant": 577, "contextual": 0}, 577, 1, (577, 0)),
        ({"dominant": 0.65, "contextual": 0.05}, 100, 0, (65, 5)),
        ({"dominant": 1.0, "contextual": 0.05}, 100, 0, (100, 0)),
        ({"dominant": 0.001, "contextual": 0.0}, 100, 1, (1, 0)),
        ({"dominant": 0.5, "contextual": 3}, 9, 1, (4, 3)),
        ({"dominant": 0.65, "contextual": 0.05}, 70, 0, (45, 3)),  # as the authors' Qwen variant: not 46 + 4
        ({"dominant": 0.65, "contextual": 0.05}, 10, 0, (6, 1)),  # and of either at least one
        ({"dominant": 0.65, "contextual": 0.0}, 10, 0, (6, 0)),
    ],
)
def test_resolve(fields, tokens, reserved, expected):
    assert ZipConfig(**fields).resolve(tokens, reserved) == expected


@pytest.mark.parametrize(
    ("fields", "tokens", "expected"),
    [
        ({"dominant": 54, "contextual": 10}, 577, (54, 10)),
        ({"dominant": 54, "contextual": 10}, 60, (54, 6)),
        ({"dominant": 54, "contextual": 10}, 4, (4, 0)),
        ({"dominant": 54, "contextual": 0.5}, 4, (4, 0)),
        ({"dominant": 0.65, "contextual": 0.05}, 1, (1, 0)),
    ],
)
def test_an_image_smaller_than_the_budget_keeps_what_it_has(fields, tokens, expected):
    assert ZipConfig(**fields).resolve(tokens, cap=True) == expected


def test_share_of_contextual_does_not_hide_a_dominant_that_is_too_large():
    with pytest.raises(ValueError, match="makes 4 tokens"):
        ZipConfig(dominant=54, contextual=0.5).resolve(4)


@pytest.mark.parametrize(("dominant", "contextual"), [(577, 1), (578, 0), (1, 577), (0.1, 9999), (1.0, 1)])
def test_more_than_there_is(dominant, contextual):
    with pytest.raises(ValueError, match=r"makes 577 tokens.*<= 577"):
        ZipConfig(dominant=dominant, contextual=contextual).resolve(577, 1)


def test_round_trip_and_frozen():
    config = ZipConfig(dominant=0.5, contextual=3, merge="mean", layer=-3)
    assert ZipConfig(**config.model_dump()) == config
    assert ZipConfig.model_validate_json(config.model_dump_json()) == config
    assert "budgets" not in config.model_dump(), "stored as before there were any"
    for budgets in ([8, "13+3", 32], {"least": 4, "most": 9, "density": [1.0]}, [0.05, 0.2]):
        config = ZipConfig(budgets=budgets)
        assert ZipConfig(**config.model_dump()) == config
        assert ZipConfig.model_validate_json(config.model_dump_json(), strict=True) == config
    with pytest.raises(ValueError, match="frozen"):
        config.dominant = 3
