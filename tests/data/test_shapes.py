"""The embedded data set: answers are true, splits can't overlap, and the folder is written whole and once."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import shapes
from data.commands.shapes import main

SCENES = [shapes.make_scene(shapes.image_seed("train", 5, index)) for index in range(300)]
seeds, indices = st.integers(0, 10**9), st.integers(0, 2**32 - 1)


@given(seeds, indices, seeds, indices)
def test_train_and_held_out_seeds_never_meet(seed, index, other_seed, other_index):
    train, held_out = shapes.image_seed("train", seed, index), shapes.image_seed("eval", other_seed, other_index)
    assert train != held_out
    assert train % 2 == 0
    assert held_out % 2 == 1


@given(st.sampled_from(shapes.SPLITS), seeds, indices, st.sampled_from(shapes.SPLITS), seeds, indices)
def test_every_image_has_a_seed_of_its_own(split, seed, index, other_split, other_seed, other_index):
    same = (split, seed, index) == (other_split, other_seed, other_index)
    assert (shapes.image_seed(split, seed, index) == shapes.image_seed(other_split, other_seed, other_index)) is same


def test_no_held_out_image_is_a_training_image():
    train, held_out = (
        {hashlib.sha256(image.tobytes()).hexdigest() for _, image in shapes.records(split, 200)}
        for split in shapes.SPLITS
    )
    assert len(train) == len(held_out) == 200
    assert not train & held_out


@pytest.mark.parametrize(("split", "seed", "index"), [("test", 0, 0), ("train", -1, 0), ("train", 0, 2**32)])
def test_a_seed_that_could_collide_is_refused(split, seed, index):
    with pytest.raises(ValueError, match="expected"):
        shapes.image_seed(split, seed, index)


def test_images_and_questions_are_functions_of_the_seed():
    first, again = (list(shapes.records("eval", 5, seed=3)) for _ in range(2))
    assert [r for r, _ in first] == [r for r, _ in again]
    assert [p.tobytes() for _, p in first] == [p.tobytes() for _, p in again]
    assert first[0][0] != next(iter(shapes.records("eval", 1, seed=4)))[0]


def test_the_data_set_is_still_that_of_its_version():
    """Measured results and the embedded model belong to these very questions: on a change, raise the version as well."""
    text = json.dumps([shapes.record(split, 0, index) for split in shapes.SPLITS for index in range(50)])
    assert (shapes._VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (1, "77cb00f69cb9386f")


def answer_by_hand(question: str, scene: shapes.Scene) -> str:
    """The answer from the words of the question alone."""
    words = re.findall(r"[a-z]+", question.lower())
    singular = [word.removesuffix("es") if word == "crosses" else word.removesuffix("s") for word in words]
    colour = next((c for c in shapes.COLOURS if c in words), None)
    name = next((n for n in shapes.SHAPES if n in words or n in singular), None)
    named = [s for s in scene.shapes if colour in (None, s.colour) and name in (None, s.name)]
    if words[:2] == ["how", "many"]:
        return str(len(named))
    if words[0] in ("is", "can"):
        assert colour
        assert name
        return "Yes" if named else "No"
    assert len(named) == 1, "the question does not say which one is meant"
    (one,) = named
    if words[0] == "where" or "part" in words:
        row, column = int(one.y // 24), int(one.x // 24)
        where = f"{['top', '', 'bottom'][row]} {['left', '', 'right'][column]}".strip()
        return where or "middle"
    return one.colour if words[1] == "colour" else one.name


def test_every_answer_is_right():
    asked = Counter()
    for scene in SCENES:
        for one in shapes.conversation(scene, types=shapes.TYPES * 2):
            assert answer_by_hand(one.question, scene) == one.answer, (one, scene)
            asked[one.type] += 1
    assert set(asked) == set(shapes.TYPES)


def test_answers_are_spread_so_that_guessing_does_not_pay():
    answers = {name: Counter() for name in shapes.TYPES}
    for scene in SCENES:
        for one in shapes.conversation(scene):
            answers[one.type][one.answer] += 1
    likeliest = {name: max(counts.values()) / counts.total() for name, counts in answers.items()}
    assert likeliest["exists"] < 0.58
    assert likeliest["count"] < 0.55
    assert max(likeliest[name] for name in ("colour", "shape", "where")) < 0.3


def test_every_type_is_asked_once_and_comes_first_sometimes():
    first = Counter()
    for index in range(300):
        types = shapes.record("train", 0, index)["types"]
        assert sorted(types) == sorted(shapes.TYPES)
        first[types[0]] += 1
    assert min(first[name] for name in shapes.TYPES) > 300 * 0.12


def test_colours_survive_the_jpeg():
    for scene in SCENES[:150]:
        drawn = shapes.draw_scene(scene)
        decoded = Image.open(io.BytesIO(shapes.encode_jpeg(drawn)))
        assert decoded.size == (shapes.SIZE, shapes.SIZE)
        chroma, wanted = (np.asarray(image.convert("YCbCr"), dtype=float)[..., 1:] for image in (decoded, drawn))
        for shape in scene.shapes:
            left, top, side = int(shape.x - shape.radius), int(shape.y - shape.radius), int(2 * shape.radius)
            box = (slice(max(0, top), top + side), slice(max(0, left), left + side))
            assert np.abs(chroma[box] - wanted[box]).mean() < 4, "with 4:2:0 it is 6.6"
            seen = decoded.getpixel((int(shape.x), int(shape.y)))
            distance = {
                name: sum((a - b) ** 2 for a, b in zip(seen, rgb, strict=True)) for name, rgb in shapes.COLOURS.items()
            }
            assert min(distance, key=distance.get) == shape.colour


def test_records_have_the_form_of_llava():
    record, image = next(iter(shapes.records("train", 1)))
    assert set(record) == {"id", "image", "conversations", "types"}
    assert image.mode == "RGB"
    turns = record["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(record["types"])
    assert turns[0]["value"].startswith("<image>\n")
    assert sum("<image>" in turn["value"] for turn in turns) == 1


def test_files_are_written_once(tmp_path, monkeypatch):
    out = tmp_path / "new" / "shapes"
    assert shapes.write(out, train=6, held_out=3, seed=1) is True
    for split, count in (("train", 6), ("eval", 3)):
        entries = json.loads((out / f"{split}.json").read_text())
        assert entries == [record for record, _ in shapes.records(split, count, seed=1)]
        for entry in entries:
            with Image.open(out / "images" / entry["image"]) as image:
                image.load()
                assert (image.format, image.size) == ("JPEG", (72, 72))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(shapes, "draw_scene", None)  # a second call does not even draw
    assert shapes.write(out, train=6, held_out=3, seed=1) is False
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert [path.name for path in out.parent.iterdir()] == ["shapes"], "something was left beside the folder"


def test_other_numbers_replace_what_was_written(tmp_path):
    out = tmp_path / "shapes"
    shapes.write(out, train=2, held_out=1)
    assert shapes.write(out, train=3, held_out=1) is True
    assert len(json.loads((out / "train.json").read_text())) == 3
    assert len(list(out.rglob("*.jpg"))) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "train.json").write_text("mine")
    with pytest.raises(ValueError, match="left alone"):
        shapes.write(tmp_path, train=1, held_out=1)
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
    assert (tmp_path / "train.json").read_text() == "mine"


def test_a_write_that_dies_leaves_nothing_and_takes_nothing(tmp_path, monkeypatch):
    out = tmp_path / "shapes"
    shapes.write(out, train=2, held_out=1)
    real, calls = shapes.encode_jpeg, []

    def dies(image):
        calls.append(image)
        if len(calls) == 3:
            raise OSError("disk full")
        return real(image)

    monkeypatch.setattr(shapes, "encode_jpeg", dies)
    with pytest.raises(OSError, match="disk full"):
        shapes.write(out, train=5, held_out=1)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert len(json.loads((out / "train.json").read_text())) == 2


@pytest.mark.parametrize("before", [None, 1])
def test_several_processes_may_write_at_once(tmp_path, before):
    out = tmp_path / "shapes"
    if before:
        shapes.write(out, train=before, held_out=before)
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda _: shapes.write(out, train=4, held_out=2), range(8)))
    assert any(written) if before else written.count(True) == 1  # who replaces at the same moment replaces the same
    assert len(list(out.rglob("*.jpg"))) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_command_line(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "s"), "--train", "2", "--eval", "1", "--seed", "7"]
    assert main(arguments) == main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 training and 1 held-out images")
    assert lines[1].endswith("there already")
    assert json.loads((tmp_path / "s" / "eval.json").read_text())[0] == shapes.record("eval", 7, 0)


def test_a_mistake_on_the_command_line_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "s"), "--train", "-1"])
    assert ended.value.code == 2
    assert "argument --train: must be at least 0, found -1" in capsys.readouterr().err
    assert main(["--out", "/proc/x", "--train", "1", "--eval", "0"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "/proc/x" in err
