"""Learning from the uncompressed model's answers: the loss against a slow reference, runs on cached answers, refused where stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.train.workspace import Ranks, config_of, losses, write_config
from train.commands import start
from train.config import ConfigError, load_config
from train.distill import Teacher, divergence_, most_likely
from train.ending import Exit
from train.loss import FrozenHeadLoss, LogitsLoss


def slowly(student: torch.Tensor, teacher: torch.Tensor, top_k: int, heat: float) -> torch.Tensor:
    """Hinton's loss word by word: the teacher's `top_k` words each, and all the others as one."""
    total = torch.zeros(())
    for own, wanted in zip(student, teacher, strict=True):
        p, q = functional.softmax(wanted / heat, 0), functional.softmax(own / heat, 0)
        best = p.argsort(descending=True)[:top_k].tolist()
        others = [word for word in range(len(p)) if word not in best]
        pairs = [(p[word], q[word]) for word in best] + [(p[others].sum(), q[others].sum())]
        total = total + sum(a * (a / b).log() for a, b in pairs) * heat**2
    return total


def teacher_of(logits: torch.Tensor, top_k: int, heat: float, weight: float = 1.0) -> Teacher:
    return Teacher(*most_likely(logits, top_k, heat), heat, weight)


@pytest.mark.parametrize(("top_k", "heat"), [(1, 1.0), (4, 1.0), (4, 3.0), (30, 0.5)])
def test_divergence_and_its_gradient_are_the_slow_ones(top_k: int, heat: float) -> None:
    torch.manual_seed(0)
    student, wanted = torch.randn(7, 31, requires_grad=True), 3 * torch.randn(7, 31)
    expected = slowly(student, wanted, top_k, heat)
    (gradient,) = torch.autograd.grad(expected, student)
    found = student.detach().clone()
    loss = divergence_(found, teacher_of(wanted, top_k, heat))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_a_certain_teacher_is_cross_entropy_and_a_student_like_it_has_nothing_to_learn() -> None:
    torch.manual_seed(0)
    student, words = torch.randn(5, 20), torch.tensor([3, 0, 19, 7, 7])
    certain = torch.full((5, 20), -1e4).scatter_(1, words[:, None], 0.0)
    expected = functional.cross_entropy(student, words, reduction="sum")
    torch.testing.assert_close(divergence_(student.clone(), teacher_of(certain, 4, 1.0)), expected)
    same = student.clone()
    assert divergence_(same, teacher_of(student, 4, 2.0)).abs() < 1e-4
    assert same.abs().max() < 1e-5


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_beside_cross_entropy_in_chunks_and_through_a_frozen_head(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    rows, head, labels = torch.randn(50, 16, requires_grad=True), torch.randn(31, 16), torch.randint(0, 31, (50,))
    wanted = torch.randn(50, 31)
    logits = rows @ head.t()
    expected = weight * slowly(logits, wanted, 5, 2.0)
    expected = expected + (1 - weight) * functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(2 * expected, rows)
    monkeypatch.setattr("train.loss.CHUNK_BYTES", 31 * 4 * 8)
    teacher = teacher_of(wanted, 5, 2.0, weight)
    for loss in (
        FrozenHeadLoss.apply(rows, head, labels, teacher),
        LogitsLoss.apply(rows @ head.t(), labels, teacher),
    ):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(2 * loss, rows)[0], gradient, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def answers(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace's model asked about its training file."""
    folder = tmp_path_factory.mktemp("teacher")
    config = config_of(workspace, folder / "run", train={"distill": {"cache": str(folder / "answers"), "top_k": 6}})
    assert start("teacher", ["--config", str(write_config(config))]) == 0
    return folder / "answers"


def learning(workspace: Path, output: Path, answers: Path, **changes):
    distill = {"cache": str(answers), "top_k": 6, **changes.pop("distill", {})}
    return config_of(workspace, output, train={"distill": distill}, **changes)


def test_answers_are_those_of_the_untouched_model(workspace: Path, tmp_path: Path, answers: Path) -> None:
    from data.cache.shards import made_for
    from data.cache.store import Store
    from data.dataset import build_dataset
    from train.build import build_model
    from train.labels import predicted_tokens
    from train.teacher_answers import key_of_sample, uncompressed_data
    from visionzip import detach

    config = load_config(write_config(learning(workspace, tmp_path / "run", answers)))
    model, processor = build_model(config)
    detach(model).eval()
    dataset, store = (
        build_dataset(uncompressed_data(config.data), processor, 0),
        Store(answers, made_for(answers / "teacher.json")),
    )
    assert len(store) == 21  # three records without a picture say what another one says
    for index in range(6):
        item = dataset[index]
        pixels = {"pixel_values": item["pixel_values"]} if "pixel_values" in item else {}
        with torch.no_grad():
            logits = model(input_ids=item["input_ids"][None], **pixels).logits[0, :-1]
        logits = logits[item["labels"][1:] != -100]
        _, kept = store.get(key_of_sample(dataset.sample(index)))
        assert torch.equal(kept["answers"], predicted_tokens(item["labels"]).int())
        log_probs = logits.log_softmax(1)
        torch.testing.assert_close(
            kept["teacher_log_probs"], log_probs.gather(1, kept["teacher_words"].long()), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(kept["teacher_log_probs"], log_probs.topk(6).values, rtol=1e-4, atol=1e-4)


@pytest.mark.launch
def test_the_same_losses_packed_or_padded_on_one_rank_or_two_from_pixels_or_the_cache(
    workspace: Path, ranks: Ranks, tmp_path: Path, answers: Path
) -> None:
    from data.commands.cache import main as make_cache

    first = learning(workspace, tmp_path / "first", answers, trainer__deepspeed="off", data__batching="random")
    ranks.run(first, world=1)
    cached = learning(workspace, tmp_path / "cached", answers, data__cache=str(tmp_path / "tokens"))
    assert make_cache(["--config", str(write_config(cached)), "--workers", "0"]) == 0
    ranks.run(cached, learning(workspace, tmp_path / "two", answers, data__batching="length"))
    plain = config_of(workspace, tmp_path / "plain", trainer__deepspeed="off")
    beside = learning(workspace, tmp_path / "beside", answers, trainer__deepspeed="off", distill={"weight": 0.5})
    ranks.run(plain, beside, world=1)
    for other in ("two", "cached"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "first"), rel=1e-5), other
    start = [losses(tmp_path / name)[0] for name in ("first", "plain", "beside")]
    assert start[2] == pytest.approx((start[0] + start[1]) / 2, rel=1e-5)
    assert start[0] < start[1]


@pytest.mark.launch
def test_answers_made_with_something_else_are_refused(
    workspace: Path, ranks: Ranks, tmp_path: Path, answers: Path
) -> None:
    config = learning(workspace, tmp_path / "other", answers, distill={"temperature": 2.0})
    ranks.start(config, world=1)
    assert ranks.wait() == [Exit.CONFIG]
    assert "temperature: 1.0 there, 2.0 here" in ranks.output()


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "visionzip-teacher/1", "model": 3, "settings": {}}'])
def test_a_damaged_manifest_is_one_message(tmp_path: Path, content: str) -> None:
    from train.teacher_answers import FORMAT, MANIFEST, check_teacher

    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match=r"teacher\.json is damaged .*; delete the folder and make the answers again"):
        check_teacher(str(tmp_path), {"format": FORMAT, "model": {}, "settings": {}})


def test_a_changed_picture_or_answer_is_not_learned_from(workspace: Path, tmp_path: Path, answers: Path) -> None:
    from transformers import AutoProcessor

    from data.dataset import build_dataset
    from train.teacher_answers import WithAnswers

    copy = tmp_path / "copy"
    shutil.copytree(workspace / "images", copy / "images")
    shutil.copytree(workspace / "model", copy / "model")
    rows = json.loads((workspace / "train.json").read_text())
    (copy / "train.json").write_text(json.dumps(rows))
    config = config_of(copy, tmp_path / "run", train={"distill": {"cache": str(tmp_path / "answers"), "top_k": 3}})
    assert start("teacher", ["--config", str(write_config(config))]) == 0
    (copy / "images" / "1.png").write_bytes((copy / "images" / "2.png").read_bytes())
    rows[2]["conversations"][1]["value"] = "no"
    (copy / "train.json").write_text(json.dumps(rows))
    data = load_config(write_config(config)).data
    dataset = build_dataset(data, AutoProcessor.from_pretrained(copy / "model"), 0)
    dataset = dataset.making(WithAnswers(dataset.encoder, tmp_path / "answers"))
    assert [dataset[index].reason for index in (1, 2)] == ["stale answer", "no teacher's answer"]
    assert dataset[3]["teacher_words"].shape == (len(dataset[3]["teacher_log_probs"]), 3)
