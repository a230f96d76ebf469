"""What a checkpoint is compared by."""

from __future__ import annotations

from typing import Any

import pytest

from train import identity
from train.config import ConfigError
from train.ending import RunEnded
from train.resume import Resume


def resume(stored: dict[str, Any]) -> Resume:
    return Resume("runs/x/checkpoint-4", {"identity": stored, "step": 4}, "")


SAME = {"base": {"llm": "a"}, "zip": {"dominant": 5}, "trains": "b", "settings": {"trainer.learning_rate": 0.1}}


def test_every_difference_is_named_by_its_path() -> None:
    before = {"data": {"sources": [{"path": "a", "weight": 1.0}], "frames": 8}, "seed": 0}
    now = {"data": {"sources": [{"path": "b", "weight": 1.0}], "frames": 8}, "seed": 1}
    assert identity.differences(before, now) == ['data.sources.0.path was "a", is "b"', "seed was 0, is 1"]
    longer = {"data": {"sources": [*now["data"]["sources"], {"path": "c"}], "frames": 8}, "seed": 0}  # type: ignore[index]
    (line,) = identity.differences(before, longer)
    assert line.startswith("data.sources was [")


def test_many_differences_are_counted() -> None:
    stored, now = {**SAME}, {**SAME, **{f"key{number}": number for number in range(30)}}
    found = identity.compare(resume(stored), now)
    assert found[0] == "key0 was null, is 0"
    assert found[-1] == "22 more differences"


def test_a_checkpoint_that_records_no_settings_can_be_resumed_and_says_so() -> None:
    old = {key: value for key, value in SAME.items() if key != "settings"}
    (line,) = identity.compare(resume({**old, "data": "0123"}), {**SAME, "data": {"frames": 8}})
    assert "could not be compared" in line
    with pytest.raises(RunEnded, match="belongs to another run"):
        identity.compare(resume({**old, "trains": "c"}), SAME)


def test_ranks_that_read_different_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node reads its own copy; training went on with two halves of different data."""
    seen = {"model": {"llm": "a"}, "data": {"train": "b"}}

    def gather(into: list[Any], mine: Any) -> None:
        into[:] = [mine, {**mine, "data": {"train": "c"}}]

    monkeypatch.setattr(identity.dist, "all_gather_object", gather)
    with pytest.raises(ConfigError, match="rank 1 reads another data than rank 0; put the same files"):
        identity.check_ranks_agree(seen, 2)
    identity.check_ranks_agree(seen, 1)
