"""What a checkpoint is compared by."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_processor
from train import identity
from train.config import ConfigError, parse_config
from train.digest import describe_processor
from train.ending import Exit, RunEnded
from train.evaluation import key_of_scores
from train.guard import run_guarded
from train.resume import Resume


def resume(stored: dict[str, Any]) -> Resume:
    return Resume("runs/x/checkpoint-4", {"identity": stored, "step": 4}, "")


SAME = {"base": {"llm": "a"}, "zip": {"dominant": 5}, "trains": "b", "settings": {"trainer.learning_rate": 0.1}}


def test_every_difference_is_named_by_its_path() -> None:
    before = {"data": {"sources": [{"path": "a", "weight": 1.0}], "frames": 8}, "seed": 0}
    now = {"data": {"sources": [{"path": "b", "weight": 1.0}], "frames": 8}, "seed": 1}
    assert identity.find_differences(before, now) == ['data.sources.0.path was "a", is "b"', "seed was 0, is 1"]
    longer = {"data": {"sources": [*now["data"]["sources"], {"path": "c"}], "frames": 8}, "seed": 0}  # type: ignore[index]
    (line,) = identity.find_differences(before, longer)
    assert line.startswith("data.sources was [")


def test_many_differences_are_counted() -> None:
    stored, now = {**SAME}, {**SAME, **{f"key{number}": number for number in range(30)}}
    found = identity.compare_identity(resume(stored), now)
    assert found[0] == "key0 was null, is 0"
    assert found[-1] == "22 more differences"


def test_a_checkpoint_that_records_no_settings_can_be_resumed_and_says_so() -> None:
    old = {key: value for key, value in SAME.items() if key != "settings"}
    (line,) = identity.compare_identity(resume({**old, "data": "0123"}), {**SAME, "data": {"frames": 8}})
    assert "could not be compared" in line
    with pytest.raises(RunEnded, match="belongs to another run"):
        identity.compare_identity(resume({**old, "trains": "c"}), SAME)


def test_a_processor_is_told_apart_by_what_makes_pixels_and_ids() -> None:
    """A resume from the same weights beside another preprocessor_config.json or tokenizer.json said nothing."""
    processor = tiny_processor()
    before = describe_processor(processor)
    processor.tokenizer(["a", "a a a"], padding=True, truncation=True, max_length=2)
    assert describe_processor(processor) == before, "the last call's padding is no property of it"
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.tokenizer.add_tokens(["<new>"])
    processor.chat_template = "{{ messages }}"
    now = describe_processor(processor)
    assert [name for name in now if now[name] == before[name]] == []


def test_scores_of_the_untrained_model_are_those_of_the_same_questions(tmp_path: Path) -> None:
    """A resume with other padding or another number of frames took up the scores of the questions as they were made before."""
    (tmp_path / "x.json").write_text('[{"conversations": []}]')
    source = [{"path": str(tmp_path / "x.json")}]

    def key(**data: Any) -> str:
        content = {"output_dir": "x", "model": {"path": "m"}, "eval": {"sources": source}}
        config = parse_config({**content, "data": {"sources": source, "cache_dir": str(tmp_path), **data}})
        return key_of_scores(config, tiny_processor(), {"llm": "a"})

    changes = [
        {},
        {"frames": 4},
        {"max_length": 64},
        {"max_pixels": 9},
        {"pad_images": False},
        {"template": "llava_v1"},
    ]
    assert len({key(**change) for change in changes}) == len(changes)
    assert key() == key(max_rejected=0.5)


def test_a_full_disk_while_records_are_indexed_is_no_mistake_in_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was reported as one, with exit code 2."""
    (tmp_path / "train.json").write_text('[{"conversations": []}]')
    data = {"sources": [{"path": str(tmp_path / "train.json")}], "cache_dir": str(tmp_path)}
    config = parse_config({"output_dir": "x", "model": {"path": "m"}, "data": data})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("data.storage.os.fsync", full)
        assert run_guarded(lambda: len(identity.content_of(config))) == Exit.STORAGE
    said = capsys.readouterr().err
    assert f"run ended with exit code 74: {tmp_path}/index/train-" in said
    assert "config error" not in said
    (tmp_path / "train.json").unlink()
    assert run_guarded(lambda: len(identity.content_of(config))) == Exit.CONFIG


def test_ranks_that_read_different_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node reads its own copy; training went on with two halves of different data."""
    seen = {"model": {"llm": "a"}, "data": {"train": "b"}}

    def gather(into: list[Any], mine: Any) -> None:
        into[:] = [mine, {**mine, "data": {"train": "c"}}]

    monkeypatch.setattr(identity.dist, "all_gather_object", gather)
    with pytest.raises(ConfigError, match="rank 1 reads another data than rank 0; put the same files"):
        identity.check_ranks_agree(seen, 2)
    identity.check_ranks_agree(seen, 1)
