"""docs/models.md says what the tests say."""

from __future__ import annotations

from scripts.models_page import COLUMNS, PAGE, every_test_passed, render
from tests.families import test_properties, test_zero3
from tests.families.case import cases


def test_the_page_is_up_to_date() -> None:
    """Written by a run in which every test passed; this run's own tests say whether they still do."""
    assert PAGE.read_text(encoding="utf-8") == render(every_test_passed()), "run: python -m scripts.models_page"


def test_a_failure_shows() -> None:
    results = every_test_passed()
    results["gradient", "LLaVA-1.5"] = False
    del results["video", "Video-LLaVA"]
    page = render(results)
    assert page.count("**fails**") == page.count("**not run**") == 1


def test_every_property_has_a_column_and_every_gap_a_reason() -> None:
    tests = {name for module in (test_properties, test_zero3) for name in vars(module) if name.startswith("test_")}
    assert {f"test_{column}" for column in COLUMNS} == tests - {"test_properties"}
    for case in cases():
        assert case.exempt.keys() <= COLUMNS.keys()
        assert all(len(reason) > 10 for reason in case.exempt.values())
        assert case.checkpoints
        assert case.special
