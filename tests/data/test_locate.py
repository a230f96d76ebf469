"""Questions about places: every answer against a slow reading of the coordinates, and the files beside a data set that stays as it is."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter

import pytest

from data import locate, shapes, stamps
from data.commands.shapes import main
from data.scenes import SIZE

WAYS = {
    "shapes": (
        shapes.locate_record,
        lambda index: [
            (f"{shape.colour} {shape.name}", shape.x / SIZE, shape.y / SIZE)
            for shape in shapes.make_scene(shapes.image_seed("train", 0, index)).shapes
        ],
    ),
    "stamps": (
        stamps.locate_record,
        lambda index: [(placed.thing.name, placed.x, placed.y) for placed in stamps.scene_of("train", 0, index).things],
    ),
}  # the record of an index; its scene as (name, x, y)


def rounds_of(record):
    said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(record["types"], said[::2], said[1::2], strict=True))


def answer_by_hand(question, things):
    """The answer, and by how much it is right, from the words of the question and all coordinates of the scene."""
    named = [thing for thing in things if re.search(rf"the {thing[0]}\b", question)]
    assert len(named) == len({name for name, *_ in named}), "the question does not say which one is meant"
    if "quarter" in question:
        ((_, x, y),) = named
        answer = ("top ", "bottom ")[y > 0.5] + ("left", "right")[x > 0.5]
        return answer, min(abs(x - 0.5), abs(y - 0.5))
    if "row and column" in question:
        ((_, x, y),) = named
        row, column = (sum(at > line for line in (1 / 3, 2 / 3)) + 1 for at in (y, x))
        return f"row {row}, column {column}", min(abs(at - line) for at in (x, y) for line in (1 / 3, 2 / 3))
    asked, corner = question.split(",")[0], next((name for name in locate.CORNERS if name in question), None)
    first, second = named
    if corner is not None:
        down, across = (float(word in corner) for word in ("bottom", "right"))
        away = [((x - across) ** 2 + (y - down) ** 2) ** 0.5 for _, x, y in (first, second)]
        ahead = (away[0] - away[1]) * (1 if "farther" in asked else -1)
    else:
        axis, sign = {"left": (1, -1), "right": (1, 1), "up": (2, -1), "down": (2, 1)}[asked.split()[-1]]
        ahead = (first[axis] - second[axis]) * sign
    return (first if ahead > 0 else second)[0], abs(ahead)


@pytest.mark.parametrize("name", WAYS)
def test_every_answer_is_right_and_clear(name):
    record, scene = WAYS[name]
    asked = Counter()
    for index in range(300):
        rounds = rounds_of(record("train", 0, index))
        assert rounds, "a record without a question"
        assert len({kind for kind, *_ in rounds}) == len(rounds)
        for kind, question, answer in rounds:
            expected, margin = answer_by_hand(question, scene(index))
            assert answer == expected, (question, scene(index))
            assert margin >= locate.CLEAR - 1e-9, (question, scene(index))
            asked[kind] += 1
    assert set(asked) == set(locate.TYPES)
    assert min(asked.values()) > 100


@pytest.mark.parametrize("name", WAYS)
def test_the_first_named_is_as_often_right_as_the_second(name):
    record, _ = WAYS[name]
    places = Counter()
    for index in range(600):
        for kind, question, answer in rounds_of(record("train", 0, index)):
            if kind in ("side", "distance"):
                places[kind, question.split(", the ")[1].startswith(answer + " or ")] += 1
    for kind in ("side", "distance"):
        first, second = places[kind, True], places[kind, False]
        assert 0.42 < first / (first + second) < 0.58


def test_what_is_not_clear_is_not_asked():
    middle, beside = locate.Located("cat", 0.5, 0.34), locate.Located("dog", 0.52, 0.33)
    for seed in range(20):
        assert locate.locate([], random.Random(seed)) == []
        assert locate.locate([middle], random.Random(seed)) == []
        assert locate.locate([middle, beside], random.Random(seed)) == []


def test_a_shape_with_a_twin_is_not_named():
    for index in range(300):
        scene = shapes.make_scene(shapes.image_seed("train", 0, index))
        names = Counter(f"{shape.colour} {shape.name}" for shape in scene.shapes)
        text = json.dumps(shapes.locate_record("train", 0, index))
        assert not [name for name, count in names.items() if count > 1 and name in text]


@pytest.mark.parametrize(("name", "expected"), [("shapes", "5a1d838f0c5ad51e"), ("stamps", "14c6a22fd33eef60")])
def test_the_questions_are_still_those_of_their_version(name, expected):
    """Measured results belong to these very questions: on a change, raise the version as well."""
    text = json.dumps([WAYS[name][0](split, 0, index) for split in ("train", "eval") for index in range(50)])
    assert (locate.VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (1, expected)


def test_locate_adds_files_and_changes_none(tmp_path, capsys):
    numbers = ["--train", "4", "--eval", "3"]
    assert main(["--out", str(tmp_path / "plain"), *numbers]) == 0
    assert main(["--out", str(tmp_path / "located"), *numbers, "--locate"]) == 0
    assert main(["--out", str(tmp_path / "located"), *numbers, "--locate"]) == 0
    assert "there already" in capsys.readouterr().out.splitlines()[-1]
    plain, located = ({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                      for folder in (tmp_path / "plain", tmp_path / "located"))  # fmt: skip
    assert set(located) - set(plain) == {"locate-train.json", "locate-eval.json"}
    assert all(located[name] == plain[name] for name in plain if name != "shapes.json")
    assert json.loads(plain["shapes.json"]) == {"version": 1, "train": 4, "eval": 3, "seed": 0}
    assert json.loads(located["locate-eval.json"]) == [shapes.locate_record("eval", 0, index) for index in range(3)]
    assert {record["image"] for record in json.loads(located["locate-train.json"])} == {
        f"train/{index:06d}.jpg" for index in range(4)
    }
