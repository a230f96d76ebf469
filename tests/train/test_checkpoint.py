"""Checkpoints on disk: whole or not there, and never taken when damaged."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.workspace import Ranks, config_of, equal, projector
from train import checkpoint, random_state
from train.checkpoint import CheckpointError
from train.resume import find_resume


def written(folder: Path, step: int = 3) -> Path:
    writer = checkpoint.Writer(folder, step)
    writer.tensor("weight/a", torch.arange(12.0).view(3, 4))
    writer.tensor("exp_avg/a", torch.ones(3, 4))
    writer.file("random.safetensors", checkpoint.as_bytes({"0/torch": torch.get_rng_state()}))
    writer.json("progress.json", {"step": step, "world_size": 1})
    writer.file("trainer_state.json", b"{}")
    return writer.commit()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    checkpoint.verify(path)
    reader = checkpoint.Reader(path)
    assert reader.shapes() == {"weight/a": [3, 4], "exp_avg/a": [3, 4]}
    assert torch.equal(reader.tensor("weight/a"), torch.arange(12.0).view(3, 4))
    assert reader.progress["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_large_states_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100)
    writer = checkpoint.Writer(tmp_path, 1)
    for number in range(5):
        writer.tensor(f"weight/{number}", torch.full((20,), float(number)))
    writer.json("progress.json", {})
    writer.file("trainer_state.json", b"{}")
    path = writer.commit()
    assert len(list(path.glob("tensors-*.safetensors"))) >= 3
    reader = checkpoint.Reader(path)
    assert [reader.tensor(f"weight/{number}")[0].item() for number in range(5)] == [0, 1, 2, 3, 4]


def test_what_a_killed_run_was_writing_is_removed_however_the_next_one_starts(tmp_path: Path) -> None:
    for wanted in (None, "auto", str(written(tmp_path))):
        (tmp_path / ".writing-checkpoint-7").mkdir()
        find_resume(wanted, str(tmp_path), 0, 1, print)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"], wanted


FILES = ("manifest.json", "progress.json", "random.safetensors", "tensors-00000.safetensors", "trainer_state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["removed", "emptied", "cut", "one bit", "a byte more"])
def test_every_damage_to_every_file_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    path = written(tmp_path)
    assert {file.name for file in path.iterdir()} == set(FILES)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "removed":
        file.unlink()
    elif damage == "emptied":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "a byte more":
        file.write_bytes(bytes(content) + (b" " if name != "manifest.json" else b"x"))
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checkpoint-3"):
        checkpoint.verify(path)


def test_any_single_bit_of_the_manifest(tmp_path: Path) -> None:
    """Its own digest catches what its JSON does not."""
    path = written(tmp_path)
    content = (path / "manifest.json").read_bytes()
    before = json.loads(content)
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 7)
        (path / "manifest.json").write_bytes(changed)
        try:
            checkpoint.verify(path)
        except CheckpointError:
            continue
        assert json.loads(changed) == before, f"byte {place}: verified although it says something else"


def test_the_newest_complete_one_is_taken_and_others_are_named(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        written(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-10" / "tensors-00000.safetensors").write_bytes(b"x")
    (tmp_path / "checkpoint-x").mkdir()
    said: list[str] = []
    assert checkpoint.find_newest_complete(tmp_path, said.append) == tmp_path / "checkpoint-9"
    assert len(said) == 2
    assert "checkpoint-11: there is no manifest.json" in said[0]
    assert "checkpoint-10: tensors-00000.safetensors has 1 bytes" in said[1]
    assert checkpoint.find_newest_complete(tmp_path / "nowhere", said.append) is None


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        written(tmp_path, step)
    checkpoint.rotate(tmp_path, 10, None)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 3
    checkpoint.rotate(tmp_path, 10, 2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    checkpoint.rotate(tmp_path, 10, 0)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-10"], "the last one is never deleted"


def test_checkpoints_of_later_steps_do_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    """They are damaged, or left by a run that went on from a checkpoint that this one was resumed before."""
    for step in (1, 2, 3, 9, 12):
        written(tmp_path, step)
    checkpoint.rotate(tmp_path, 3, 2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("name", ["tensors-00001.safetensors", "notes.txt", ".hidden", "folder"])
def test_a_file_that_the_manifest_does_not_list_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """A shard copied into the directory took the place of the weights."""
    path = written(tmp_path)
    if name == "folder":
        (path / name).mkdir()
    else:
        (path / name).write_bytes(checkpoint.as_bytes({"weight/a": torch.zeros(3, 4)}))
    with pytest.raises(CheckpointError, match=rf"checkpoint-3: {re.escape(name)} is not listed in manifest\.json"):
        checkpoint.verify(path)
    with pytest.raises(CheckpointError, match="is not listed"):
        checkpoint.Reader(path)


def test_one_that_is_there_already_is_replaced(tmp_path: Path) -> None:
    damaged = written(tmp_path)
    (damaged / "progress.json").unlink()
    checkpoint.verify(written(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("moment", range(9))
def test_a_kill_at_any_moment_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Ends at each write, sync, rename in turn; what is left is either as before or the whole new one."""

    class Killed(BaseException):
        pass

    written(tmp_path, 1)
    count = 0

    def dying(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(checkpoint.os, "fsync", dying(os.fsync))
    monkeypatch.setattr(checkpoint.os, "rename", dying(os.rename))

    def save_and_rotate() -> None:
        written(tmp_path, 2)
        checkpoint.rotate(tmp_path, 2, 1)

    with pytest.raises(Killed):
        save_and_rotate()
    monkeypatch.undo()
    checkpoint.remove_leftovers(tmp_path)
    found = checkpoint.find_newest_complete(tmp_path, print)
    assert found is not None
    assert found.name == ("checkpoint-1" if moment < 7 else "checkpoint-2")
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())


def test_random_states_come_back() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    random.gauss(0, 1)
    np.random.standard_normal()  # both keep a second normal number for the next call
    state = {name: value.clone() for name, value in random_state.capture().items()}
    draw = lambda: (random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(1).item())  # noqa: E731
    first = draw()
    with random_state.preserve():
        draw()
    assert draw() != first
    random_state.restore(state)
    assert draw() == first


@pytest.mark.launch
def test_a_run_goes_on_from_the_newest_whole_one_and_says_so(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    save = {"trainer__save_strategy": "steps", "trainer__save_steps": 2, "trainer__save_total_limit": 9}
    whole = config_of(workspace, tmp_path / "whole", **save)
    ranks.run(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "projector")
    for step, name in ((6, "tensors-00000.safetensors"), (4, "random.safetensors")):
        file = tmp_path / "run" / f"checkpoint-{step}" / name
        content = bytearray(file.read_bytes())
        content[-9] ^= 4
        file.write_bytes(content)
    said = ranks.run(config_of(workspace, tmp_path / "run", **save))
    assert "skipping a damaged checkpoint" in said
    assert "checkpoint-6: tensors-00000.safetensors was changed after it was written" in said
    assert "checkpoint-4: random.safetensors was changed" in said
    assert f"resuming from {tmp_path}/run/checkpoint-2" in said
    assert equal(projector(tmp_path / "run"), projector(tmp_path / "whole"))
    for step in (4, 6):
        checkpoint.verify(tmp_path / "run" / f"checkpoint-{step}")
    named = config_of(workspace, tmp_path / "other", trainer__resume=str(tmp_path / "whole" / "checkpoint-6"))
    (tmp_path / "whole" / "checkpoint-6" / "progress.json").unlink()
    ranks.start(named)
    assert 74 in ranks.wait()
    assert "progress.json is missing" in ranks.output()
