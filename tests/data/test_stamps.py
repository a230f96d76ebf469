"""The data set of photographed stamps, made of stand-ins: plain coloured files under the catalogue's names."""

import json
import subprocess

import pytest
from PIL import Image

from data import stamp_files, stamps
from data.commands.stamps import main
from data.config import DataConfig
from data.dataset import InstructionDataset
from data.sample import Sample
from data.stamp_scenes import CATALOGUE, KINDS, QUADRANTS, paint

SMALL = stamps.Size(train=12, eval=4, unseen=4, side=64)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of stamps, one background photograph)"""
    root = tmp_path_factory.mktemp("stamps")
    for number, path in enumerate(path for thing in CATALOGUE for path in thing.stamps):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        stamp = Image.new("RGBA", (24, 16), (0, 0, 0, 0))
        stamp.paste((255, number % 200, 0, 255), (2, 2, 22, 14))
        stamp.save(root / path)
    background = root / "sky.png"
    Image.new("RGB", (80, 60), (0, 0, 255)).save(background)
    return root, [background]


def scenes(split, count=400):
    return [stamps.scene_of(split, 0, index) for index in range(count)]


def test_splits_show_what_they_say():
    names = {
        split: {placed.thing.name for scene in scenes(split) for placed in scene.things} for split in stamps.SPLITS
    }
    assert names["train"] == names["eval"] == {thing.name for thing in CATALOGUE if thing.seen}
    assert names["unseen"] == {thing.name for thing in CATALOGUE if not thing.seen}
    assert not names["train"] & names["unseen"]
    placed = {split: [scene.things for scene in scenes(split)] for split in ("train", "eval")}
    assert not [things for things in placed["eval"] if things in placed["train"]]  # places are continuous


def test_a_thing_lies_in_the_quadrant_it_is_said_to_lie_in():
    for scene in scenes("train"):
        assert len({placed.quadrant for placed in scene.things}) == len({placed.thing.name for placed in scene.things})
        for placed in scene.things:
            row, column = divmod(placed.quadrant, 2)
            assert (placed.y > 0.5, placed.x > 0.5) == (bool(row), bool(column))
            assert min(abs(placed.x - 0.5), abs(placed.y - 0.5)) > 0.06


def answer_to(scene, made):
    """The answer read off the scene and the words of the question alone, by another way than the one that made it."""
    words = made.question.rstrip("?.").lower()
    by_place = {placed.place: placed.thing for placed in scene.things}
    place = next((quadrant for quadrant in QUADRANTS if quadrant in words), None)
    if made.type == "what":
        return by_place[place].name if place in by_place else "nothing"
    if made.type == "kind":
        return by_place[place].kind
    named = [placed for placed in scene.things if f"the {placed.thing.name}" in words]
    if made.type == "where":
        found = named or [placed for placed in scene.things if words.endswith(f"the {placed.thing.kind}")]
        (only,) = found
        return only.place
    if made.type == "count":
        kinds = [placed.thing.kind for placed in scene.things]
        return str(len(kinds) if "things" in words else sum(kinds.count(kind) for kind in KINDS if kind in words))
    if made.type == "exists":
        thing = words.split(" in the picture")[0].removeprefix("is there ").removeprefix("can you see ")
        thing = thing.split(" ", 1)[1]
        there = {placed.thing.name for placed in scene.things} | {placed.thing.kind for placed in scene.things}
        return "yes" if thing in there else "no"
    if made.type == "order":
        sign, axis = {"left": (1, "x"), "right": (-1, "x"), "higher": (1, "y"), "lower": (-1, "y")}[
            next(word for word in ("left", "right", "higher", "lower") if word in words.split(",")[0])
        ]
        return min(named, key=lambda placed: sign * getattr(placed, axis)).thing.name
    (known,) = [placed for placed in scene.things if words.endswith(f" the {placed.thing.name}")]
    down, across = {"above": (-1, 0), "below": (1, 0), "left": (0, -1), "right": (0, 1)}[
        next(word for word in ("above", "below", "left", "right") if word in words)
    ]
    row, column = divmod(known.quadrant, 2)
    return by_place[QUADRANTS[2 * (row + down) + column + across]].name


@pytest.mark.parametrize("split", stamps.SPLITS)
def test_answers_are_right(split):
    asked = dict.fromkeys(stamps.TYPES, 0)
    for scene in scenes(split):
        for made in stamps.conversation(scene, split):
            if made.type == "caption":
                assert all(f"{placed.thing.name} at the {placed.place}" in made.answer for placed in scene.things)
                continue
            asked[made.type] += 1
            assert made.answer == answer_to(scene, made), (scene, made)
    expected = stamps.UNSEEN_TYPES if split == "unseen" else stamps.TYPES
    assert {name for name, count in asked.items() if count > 100} == set(expected)


def test_unseen_things_are_never_named():
    names = [thing.name for thing in CATALOGUE if not thing.seen]
    for scene in scenes("unseen"):
        for made in stamps.conversation(scene, "unseen"):
            assert not [name for name in names if name in f"{made.question} {made.answer}"]


def test_no_question_is_asked_twice_in_a_conversation():
    for scene in scenes("train"):
        questions = [made.question for made in stamps.conversation(scene, "train")]
        assert len(questions) == len(set(questions))


def test_answers_are_balanced():
    rounds = [made for scene in scenes("train", 1500) for made in stamps.conversation(scene, "train")]
    for name, most in {"exists": 0.56, "where": 0.3, "count": 0.4, "kind": 0.5, "what": 0.08}.items():
        answers = [made.answer for made in rounds if made.type == name]
        assert max(map(answers.count, set(answers))) < most * len(answers), name


def test_stamps_are_painted_where_the_scene_says(files):
    root, backgrounds = files
    for scene in scenes("train", 20):
        image = paint(scene, root, backgrounds, 64)
        assert image.size == (64, 64)
        for placed in scene.things:
            red, green, blue = image.getpixel((round(placed.x * 64), round(placed.y * 64)))
            assert red > 230
            assert green < 215
            assert blue < 25
        assert list(image.getdata()) == list(paint(scene, root, backgrounds, 64).getdata())


def test_written_data_is_read_by_the_ordinary_reader(files, tmp_path, processor):
    root, backgrounds = files
    out, written = tmp_path / "made", []
    assert stamps.write(out, root, backgrounds, SMALL, workers=1, progress=written.append)
    assert written == list(range(1, 21))
    assert not stamps.write(out, root, backgrounds, SMALL, workers=1)  # there already
    for split, count in (("train", 36), ("eval", 4), ("unseen", 4)):
        records = json.loads((out / f"{split}.json").read_text())
        assert [len(record["types"]) * 2 for record in records] == [len(r["conversations"]) for r in records]
        config = DataConfig(
            sources=[{"path": str(out / f"{split}.json"), "images": str(out / "images")}], template="llava_v1"
        )
        dataset = InstructionDataset(config, processor, seed=0)
        assert len(dataset) == count
        samples = [dataset.sample(index) for index in range(count)]
        assert all(isinstance(sample, Sample) and sample.types for sample in samples)
        assert all("input_ids" in dataset[index] for index in range(count))


def test_locate_adds_files_and_changes_none(files, tmp_path):
    root, backgrounds = files
    size = stamps.Size(train=3, eval=2, unseen=1, side=32)
    for name in ("plain", "located"):
        assert stamps.write(tmp_path / name, root, backgrounds, size, workers=1, located=name == "located")
    assert not stamps.write(tmp_path / "located", root, backgrounds, size, workers=1, located=True)
    plain, located = ({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                      for folder in (tmp_path / "plain", tmp_path / "located"))  # fmt: skip
    assert set(located) - set(plain) == {"locate-train.json", "locate-eval.json"}
    assert all(located[name] == plain[name] for name in plain if name != "stamps.json")
    assert json.loads(located["locate-eval.json"]) == [stamps.locate_record("eval", 0, index) for index in range(2)]


def test_two_processes_write_the_same_images(files, tmp_path):
    root, backgrounds = files
    size = stamps.Size(train=110, eval=1, unseen=1, side=32)
    for workers in (1, 2):
        stamps.write(tmp_path / str(workers), root, backgrounds, size, workers=workers)
    for path in sorted((tmp_path / "1" / "images").rglob("*.jpg")):
        assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes()


def test_command_with_folders_given_by_hand(files, tmp_path, capsys):
    root, _ = files
    arguments = ["--out", str(tmp_path / "out"), "--train", "3", "--eval", "1", "--unseen", "1", "--side", "48"]
    arguments += ["--stamps", str(root), "--backgrounds", str(root), "--workers", "1"]
    assert main(arguments) == 0
    assert "3 training, 1 held-out scenes" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stamps", "{empty}", "--backgrounds", "{empty}"], "contains no .jpg or .png file"),
        (["--stamps", "{empty}", "--backgrounds", "{root}"], "lacks 1"),
        (["--out", "/proc/x", "--stamps", "{root}", "--backgrounds", "{root}"], "/proc/x"),
    ],
)
def test_wrong_folders_are_one_line(files, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    given = [word.format(empty=tmp_path / "empty", root=files[0]) for word in arguments]
    assert main(["--out", str(tmp_path / "out"), "--train", "1", *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("data.commands.stamps: ")
    assert message in error


def test_files_are_fetched_once(files, tmp_path, monkeypatch):
    calls = []

    def run(command, cwd, **kwargs):
        calls.append(command)
        if command[0] == "apt-get":
            (tmp_path / cwd / f"{command[-1]}_1_all.deb").touch()
        else:
            (tmp_path / cwd / command[-1] / "usr").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(stamp_files.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(stamp_files.subprocess, "run", run)
    folder, photographs = stamp_files.fetch(tmp_path / "cache")
    assert len(calls) == 4
    assert folder == tmp_path / "cache/tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
    assert len(photographs) == len(stamp_files.BACKGROUNDS)
    stamp_files.fetch(tmp_path / "cache")
    assert len(calls) == 4
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["tuxpaint-data", "tuxpaint-stamps-default"]


def test_what_can_be_missing_for_fetching_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(stamp_files.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"apt-get is not on this machine.*--stamps and --backgrounds"):
        stamp_files.fetch(tmp_path / "cache")
    monkeypatch.setattr(stamp_files.shutil, "which", lambda name: f"/usr/bin/{name}")
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package\n")
    monkeypatch.setattr(stamp_files.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded.*E: Unable to locate"):
        stamp_files.fetch(tmp_path / "cache")
