"""Scoring: shared over processes, every question once; full, training-free and fine-tuned in one table and one report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.train.workspace import ROOT, Ranks, config_of, environment, write_config
from train import held_out as held_out_module
from train import report
from train.build import build_model
from train.commands import start
from train.compare import compare_models
from train.config import EvalSection, load_config, parse_config
from train.held_out import NumberedQuestions, generate_answers, merge_answers, score_model
from train.metrics import normalise_answer
from train.scores import LABELS, Scores, describe_recovery, render_scores


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Yes.", "yes", True),
        ("  two  words ", "two words", True),
        ("two\nwords", "two words", True),
        ("3.5", "3.5", True),
        ("yes .", "yes", True),
        ("3.", "3", True),
        ("yes..", "yes", False),
        ("yes!", "yes", False),
        ("", "no", False),
    ],
)
def test_case_spaces_and_a_final_full_stop_do_not_count(a: str, b: str, same: bool) -> None:
    assert (normalise_answer(a) == normalise_answer(b)) == same


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("questions", [1, 5, 6])
def test_every_question_is_answered_and_counted_once(world: int, questions: int) -> None:
    shares = [NumberedQuestions(list(range(questions)), rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "ZeRO-3 needs as many turns on every process"
    answered: dict[int, Any] = {}
    for share in shares:
        for place in range(len(share)):
            number, question = share[place]
            assert number == question
            answered[number] = {"type": "t", "right": number % 2 == 0}
    scores = merge_answers(answered, 1)
    assert scores.types == {"t": ((questions + 1) // 2, questions)}


def held_out(workspace: Path) -> dict[str, Any]:
    """Held-out questions whose right answers are what the model says, for half of them."""
    return {
        "sources": [{"path": str(workspace / "heldout.json"), "images": str(workspace / "images")}],
        "max_new_tokens": 3,
        "batch_size": 4,
    }


def known_answers(workspace: Path, output: Path) -> Path:
    """A held-out file in which the first answer of every record is what the training-free model answers."""
    config = parse_config(config_of(workspace, output, eval=held_out(workspace)))
    model, processor = build_model(config)
    answers = {row["id"]: row["answer"] for row in score_model(model, processor, config).answers}
    rows = json.loads((workspace / "heldout.json").read_text())
    for row in rows:
        row["types"] = ["first"] + ["later"] * (len(row["conversations"]) // 2 - 1)
        row["conversations"][1]["value"] = (answers[f"{row['id']}/0"] or "nothing").upper() + "."
    path = output.parent / "known.json"
    path.write_text(json.dumps(rows))
    return path


def test_what_is_given_to_generate_lies_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visual tokens out of a cache too, which are lists of tensors, or of dicts of them."""

    class Model:
        device, dtype = torch.device("meta"), torch.bfloat16

        def encoder_outputs(self, images: list[Any], kind: str) -> dict[str, Any]:
            return {kind: images}

        def generate(self, **given: Any) -> torch.Tensor:
            self.given = given
            return torch.zeros(1, 3, dtype=torch.long)

    class Tokenizer:
        pad_token_id = 0

        def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
            return ["yes"] * len(ids)

    model = Model()
    monkeypatch.setattr(held_out_module, "attached", lambda found: found)
    images = [torch.ones(2, 3), {"tokens": torch.ones(2, 3), "places": torch.ones(2, 2, dtype=torch.long)}]
    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.long), "visual_tokens": images}
    sources = EvalSection.model_validate({"sources": [{"path": "held out"}]})
    assert generate_answers(model, Tokenizer(), inputs, sources) == ["yes"]
    plain, several = model.given["mm_encoder_outputs"]["image"]
    found = [model.given["input_ids"], plain, several["tokens"], several["places"]]
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert [tensor.dtype for tensor in found] == [torch.int64, torch.bfloat16, torch.bfloat16, torch.int64]


@pytest.mark.launch
def test_a_run_compares_all_three_and_writes_its_report(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    known = known_answers(workspace, tmp_path / "probe")
    section = {**held_out(workspace), "sources": [{"path": str(known), "images": str(workspace / "images")}]}
    changes = {"eval": section, "report__enabled": True, "report__images": 2, "seed": 3}
    two = config_of(workspace, tmp_path / "two", **changes)
    own = tmp_path / "own.json"  # a file of one's own is known for ZeRO-3 by what it says
    own.write_bytes((ROOT / "configs" / "deepspeed" / "zero3.json").read_bytes())
    three = config_of(workspace, tmp_path / "zero3", trainer__deepspeed=str(own), **changes)
    said = ranks.run(two, three)
    assert "| training-free | 7 " in said
    found = json.loads((tmp_path / "two" / "report" / "results.json").read_text())
    assert found["by_type"]["training_free"]["first"] == 1.0, "it answers as it did before"
    assert (found["tokens"], found["of_tokens"], found["questions"]) == (7, 16, 12)
    assert (found["seed"], found["trainable_parameters"]) == (3, 3936)
    assert 0 <= found["full"] < 1
    assert 0 <= found["fine_tuned"] <= 1
    sharded = json.loads((tmp_path / "zero3" / "report" / "results.json").read_text())
    assert sharded["by_type"]["training_free"] == found["by_type"]["training_free"]
    assert sharded["by_type"]["full"] == found["by_type"]["full"]
    folder = tmp_path / "two" / "report"
    for name in ("loss.png", "accuracy.png", "kept_0.png", "kept_1.png"):
        assert Image.open(folder / name).size[0] > 500
    assert "fine-tuned" in (folder / "table.md").read_text()
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 36

    from visionzip import load

    model, processor = load(tmp_path / "two" / "projector", device="cpu")
    alone = score_model(model, processor, parse_config(two))
    tuned = [row for row in answers if row["model"] == "fine_tuned"]
    assert [row["answer"] for row in alone.answers] == [row["answer"] for row in tuned], (
        "what was saved answers the same"
    )


@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_alone(workspace: Path, ranks: Ranks, tmp_path: Path, processes: int) -> None:
    config = config_of(workspace, tmp_path / "run", eval=held_out(workspace))
    ranks.run(config)
    path = write_config(config)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = [sys.executable, *(launcher if processes > 1 else [])]
    done = subprocess.run(
        [*start, "-m", "train.evaluate", "--config", str(path), f"model.projector={tmp_path}/run/projector"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")] == [
        "model",
        "full tokens",
        "training-free",
        "fine-tuned",
    ]


@pytest.mark.launch
def test_a_lora_run_is_evaluated_with_its_adapters(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """From its directory: the answers of what it trained, and afterwards those of the base model, as the run itself had them."""
    config = config_of(
        workspace, tmp_path / "run", eval=held_out(workspace), train={"lora": {"on": ["llm"], "r": 4}},
        trainer__learning_rate=3e-2, report__enabled=True, report__images=0, trainer__deepspeed="off",
    )  # fmt: skip
    assert f"adapter: {tmp_path / 'run' / 'adapter'}" in ranks.run(config, world=1)
    said = [json.loads(line) for line in (tmp_path / "run/report/answers.jsonl").read_text().splitlines()]
    expected = {name: [row["answer"] for row in said if row["model"] == name] for name in LABELS}
    assert expected["training_free"] != expected["fine_tuned"]
    results, _ = compare_models(load_config(tmp_path / "run.yaml", [f"model.projector={tmp_path / 'run'}"]))
    assert {name: [row["answer"] for row in results[name].answers] for name in LABELS} == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["model.projector=/nonexistent"], "config error: model.projector: "),
        (["eval.sources.0.path=/nonexistent.json"], "config error: eval: "),
    ],
)
def test_what_can_not_be_evaluated_is_said_in_a_line(
    changes: list[str], says: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(config_of(workspace, tmp_path / "run", eval=held_out(workspace)))
    assert start("evaluate", ["--config", str(path), *changes]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(says)
    assert "/nonexistent" in line


def scores(**right: int) -> dict[str, Scores]:
    return {name: Scores({"a": (value, 100), "b": (50, 100)}) for name, value in right.items()}


def test_the_table_and_what_was_won_back() -> None:
    found = scores(full=100, training_free=60, fine_tuned=90)
    text = render_scores(found, 16, 81)
    assert "| full tokens   | 81     | 100.0 % | 50.0 % | 75.0 % |" in text
    assert "| fine-tuned    | 16     | 90.0 %  | 50.0 % | 70.0 % |" in text
    assert describe_recovery(found) == (
        "Compression cost 20.0 points; fine-tuning the projector won 15.0 back: 75% of it."
    )
    assert describe_recovery(scores(full=1)) == ""
    assert report.summarize_results(found, 16, 81, 0, 5)["fine_tuned"] == 0.7
    assert "full" not in report.summarize_results(scores(fine_tuned=9), 16, 81, 0, 5)


def test_full_tokens_where_the_projector_has_another_dtype_than_the_encoder() -> None:
    """Without DeepSpeed what trains is float32 beside frozen weights in bfloat16; here float64 beside float32."""
    from transformers import AutoModelForImageTextToText

    from train.evaluation import projectors_in_their_dtype

    model = AutoModelForImageTextToText.from_pretrained(ROOT / "data" / "tiny-llava").eval()
    pixels = torch.randn(1, 3, 72, 72, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model.get_image_features(pixel_values=pixels).pooler_output[0]
        projector = model.model.multi_modal_projector.double()
        with pytest.raises(RuntimeError, match="dtype"):
            model.model.get_image_features(pixel_values=pixels)
        with projectors_in_their_dtype(model):
            found = model.model.get_image_features(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)
    assert not projector._forward_pre_hooks
