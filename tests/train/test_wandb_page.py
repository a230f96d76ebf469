"""What a run puts on its W&B page beside curves, read back from the offline file of a real run."""

import json

import pytest

from tests.train.workspace import config_of, launch, make_workspace
from train.wandb_files import read_history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps that shows two images at every third."""
    folder = make_workspace(tmp_path_factory.mktemp("space"))
    output = folder / "run"
    config = config_of(
        folder, output, wandb={"enabled": True, "mode": "offline"}, report={"enabled": True, "images": 2, "look_every": 3},
        trainer__deepspeed="off",
        eval={"sources": [{"path": str(folder / "heldout.json"), "images": str(folder / "images")}], "max_new_tokens": 4},
    )  # fmt: skip
    launch(config, WANDB_MODE="offline")
    (file,) = output.glob("wandb/offline-run-*/run-*.wandb")
    return file, read_history(file), config


def test_looks_at_fixed_images_every_so_often(run):
    file, rows, _ = run
    looks = [row for row in rows if "samples/1.path" in row]
    assert [row["train/global_step"] for row in looks] == [3, 6]
    captions = [row[f"samples/{place}.caption"] for row in looks for place in (1, 2)]
    assert all("asked: what is this · expected: " in caption and " · answered: " in caption for caption in captions)
    questions = [caption.split(" · ", 1)[1].split(" · answered")[0] for caption in captions]
    assert questions[:2] == questions[2:]  # the same ones each time
    for row in looks:
        assert 0 <= row["samples/right, %"] <= 100
        assert row["samples/1.width"] > 500
        assert (file.parent / "files" / row["samples/1.path"]).is_file()


def test_a_table_of_every_prediction(run):
    file, rows, _ = run
    (path,) = [row["predictions/held-out.path"] for row in rows if "predictions/held-out.path" in row]
    table = json.loads((file.parent / "files" / path).read_text())
    assert table["columns"] == [
        "question id",
        "type",
        "question",
        "expected",
        "full tokens",
        "training-free",
        "fine-tuned",
        "right",
    ]
    answers = [json.loads(line) for line in (file.parents[2] / "report" / "answers.jsonl").read_text().splitlines()]
    by_model = {
        name: {row["id"]: row for row in answers if row["model"] == name}
        for name in ("full", "training_free", "fine_tuned")
    }
    assert len(table["data"]) == len(by_model["full"]) > 5
    for identity, _, question, expected, full, free, tuned, _ in table["data"]:
        row = by_model["full"][identity]
        assert (question, expected) == (row["question"], row["expected"])
        assert [full, free, tuned] == [by_model[name][identity]["answer"] for name in by_model]


def test_accuracy_bars(run):
    file, rows, _ = run
    (path,) = [row["eval/accuracy_table.path"] for row in rows if "eval/accuracy_table.path" in row]
    table = json.loads((file.parent / "files" / path).read_text())
    results = json.loads((file.parents[2] / "report" / "results.json").read_text())
    assert table["columns"] == ["model", "exact match, %"]
    assert table["data"] == [
        [f"full tokens ({results['of_tokens']} tokens)", pytest.approx(100 * results["full"])],
        [f"training-free ({results['tokens']} tokens)", pytest.approx(100 * results["training_free"])],
        [f"fine-tuned ({results['tokens']} tokens)", pytest.approx(100 * results["fine_tuned"])],
    ]


def test_looking_changes_nothing(run, tmp_path):
    """The same run without it: the same losses, to the last bit."""
    file, _, config = run
    plain = {**config, "output_dir": str(tmp_path / "plain"), "wandb": {"enabled": False}, "report": {"enabled": False}}
    launch({key: value for key, value in plain.items() if key != "eval"})

    def losses(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    assert losses(file.parents[2]) == losses(tmp_path / "plain")
    assert len(losses(tmp_path / "plain")) >= 1
