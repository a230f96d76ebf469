"""Records chosen by how much compression changes their answers: against asking each alone, and written in the source's own layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.train.workspace import config_of, write_config
from train.config import load_config
from train.difficulty import Said, Score, choose, compare, main, measure, rounds_of, write_subset


def test_rounds_are_counted_at_predicted_tokens() -> None:
    labels = torch.tensor([-100, 5, 6, -100, -100, 7, -100, 8, 9])
    assert rounds_of(labels).tolist() == [0, 0, 1, 2, 2]
    assert rounds_of(torch.tensor([4, 5, -100, 6])).tolist() == [0, 1]  # the first token of a row is not predicted
    full = Said(torch.tensor([1, 2, 3, 4, 5]), rounds_of(labels), 0.5)
    other = Said(torch.tensor([1, 2, 9, 4, 9]), rounds_of(labels), 0.75)
    assert compare(full, other) == {"answers": 3, "changed": 2, "loss_full": 0.5, "loss_compressed": 0.75}


def test_scores_are_those_of_each_record_asked_alone(workspace: Path, tmp_path: Path) -> None:
    from data.dataset import build_dataset
    from train.build import build_model
    from visionzip import detach

    config = load_config(write_config(config_of(workspace, tmp_path / "run", data__max_length=4096)))
    scores = measure(config)
    assert [score.id for score in scores] == [f"r{number}" for number in range(24)]
    model, processor = build_model(config)
    model.eval()
    words, losses = {}, {}
    for compressed in (True, False):
        if not compressed:
            detach(model)
        dataset = build_dataset(config.data, processor, 0)
        for number in (0, 1, 5):
            item = dataset[number]
            pixels = {"pixel_values": item["pixel_values"]} if "pixel_values" in item else {}
            with torch.no_grad():
                logits = model(input_ids=item["input_ids"][None], **pixels).logits[0, :-1]
            real = item["labels"][1:] != -100
            losses[number, compressed] = functional.cross_entropy(logits[real], item["labels"][1:][real]).item()
            words[number, compressed] = logits[real].argmax(1)
    for number in (0, 1, 5):
        assert scores[number].loss_compressed == pytest.approx(losses[number, True], rel=1e-4)
        assert scores[number].loss_full == pytest.approx(losses[number, False], rel=1e-4)
        assert (scores[number].changed > 0) == bool((words[number, True] != words[number, False]).any())
    assert scores[0].changed == 0  # it has no picture
    assert scores[0].loss_full == pytest.approx(scores[0].loss_compressed, rel=1e-4)


def test_the_hardest_are_those_that_change_most_then_those_whose_loss_rises_most() -> None:
    made = [(0, 9.0), (2, 0.1), (1, 0.5), (1, 0.7), (0, 0.0)]
    scores = [Score("s", n, str(n), 2, changed, 0.0, rise) for n, (changed, rise) in enumerate(made)]
    assert [score.position for score in choose(scores, 0.4)[0]] == [1, 3]
    hardest, drawn = choose(scores, 0.6)
    assert [score.position for score in hardest] == [1, 2, 3]
    assert len(drawn) == 3
    assert drawn == choose(scores, 0.6)[1]


def test_subsets_are_data_sources(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(config_of(workspace, tmp_path / "run"))
    assert main(["--config", str(config), "--out", str(tmp_path / "out"), "--share", "0.25"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    records = {row["id"]: row for row in json.loads((workspace / "train.json").read_text())}
    for name in ("hardest", "random"):
        kept = json.loads((tmp_path / "out" / name / "train.json").read_text())
        assert len(kept) == 6
        assert all(records[record["id"]] == record for record in kept)
    assert len(rows) == 24
    assert f"images: {workspace / 'images'}" in capsys.readouterr().out


def test_a_source_that_is_not_json_becomes_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    from data.config import SourceConfig
    from data.records import open_records

    Dataset.from_list([{"question": f"q{n}", "answer": str(n)} for n in range(5)]).to_parquet(tmp_path / "qa.parquet")
    path = write_subset(tmp_path / "out", SourceConfig(path=str(tmp_path / "qa.parquet")), [1, 4], None)
    kept = open_records(SourceConfig(path=str(path)), None)
    assert [kept[place]["answer"] for place in range(len(kept))] == ["1", "4"]
