"""`visionzip benchmark`: what it counts is right; seconds are only looked at for their order."""

import json

import pytest
import torch

from tests.families.case import cases
from tests.families.case import make_image as photo
from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, save
from visionzip.benchmark import benchmark, render_rows
from visionzip.cli import main

NEW = 4


@pytest.fixture(scope="module")
def rows():
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    found = benchmark(
        model, processor, make_image(0), budgets=[None, ZipConfig(dominant=5, contextual=3)], batches=[1, 3], turns=2,
        new_tokens=NEW, repeats=1,
    )  # fmt: skip
    assert attached(model).config == ZipConfig(dominant=5, contextual=3)  # as it was
    return {(row.budget, row.batch, row.turn): row for row in found}


def test_every_combination_once(rows):
    assert sorted(rows) == sorted((b, n, t) for b in ("all", "5 + 3") for n in (1, 3) for t in (1, 2))


def test_tokens(rows):
    for (budget, _, turn), row in rows.items():
        assert row.visual_tokens == (16 if budget == "all" else 8)
        shorter = rows[("all", row.batch, turn)].prompt_tokens - row.prompt_tokens
        assert shorter == (0 if budget == "all" else 8)


def test_keys_and_values_in_bytes(rows):
    """2 layers, keys and values, 2 heads of 12 floats, for every token but the last one said."""
    for row in rows.values():
        assert row.cache == 2 * 2 * (2 * 12 * 4) * row.batch * (row.prompt_tokens + NEW - 1)


def test_work_follows_tokens(rows):
    for budget in ("all", "5 + 3"):
        one, three = rows[(budget, 1, 1)], rows[(budget, 3, 1)]
        assert three.flops == 3 * one.flops
        assert rows[(budget, 1, 2)].flops is None
    full, few = rows[("all", 1, 1)], rows[("5 + 3", 1, 1)]
    per_token = 2 * 2 * (48 * 48 * 2 + 48 * 24 * 2 + 48 * 96 * 3)  # 2 FLOP × 2 layers × (q, o, k, v, gate, up, down)
    attention = lambda length: 2 * 2 * 2 * length * length * 48  # noqa: E731
    for row in (full, few):
        length = row.prompt_tokens
        head = 2 * 48 * 20  # one position, 20 words
        assert row.flops - row.encode_flops == length * per_token + attention(length) + head
    # 2 of 3 layers instead of all, and 8 instead of 16 tokens through the projector; all maps are never formed
    assert few.encode_flops < full.encode_flops


def test_times_are_in_order(rows):
    for row in rows.values():
        assert 0 < row.prefill < row.first
        assert row.decode > 0
        assert row.encode > 0 if row.turn == 1 else row.encode == 0
        assert row.encode + row.prefill <= row.first
        assert row.peak is None or row.peak > 1e7


def test_the_table(rows):
    lines = render_rows(list(rows.values())).splitlines()
    assert len(lines) == 2 + 8
    full, few = rows[("all", 1, 1)], rows[("5 + 3", 1, 1)]
    line = next(line for line in lines if line.startswith("| 5 + 3 | 1 | 1 |"))
    assert f"({full.cache / few.cache:.1f}×)" in line


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-OneVision", "Qwen2.5-VL", "Gemma 3", "PaliGemma"])
def test_other_families(name):
    case = next(case for case in cases() if case.name == name)
    model, processor = case.model(), case.processor()
    processor.chat_template = None
    if name.startswith("LLaVA"):
        processor.image_token = case.image_text
    attach(model, processor, case.budget)
    full, few = benchmark(model, processor, photo(0, (300, 200)), budgets=[None, case.budget], new_tokens=3, repeats=1)
    assert few.visual_tokens == case.count(case.budget, (300, 200))
    assert few.visual_tokens < full.visual_tokens
    assert full.prompt_tokens - few.prompt_tokens == full.visual_tokens - few.visual_tokens
    assert few.cache < full.cache


def test_the_command(model_folder, tmp_path, capsys):
    out = tmp_path / "new" / "b.json"
    arguments = ["benchmark", str(model_folder), "--budgets", "all,8", "--new-tokens", "3", "--repeats", "1",
                 "--json", str(out), "--plot", str(tmp_path / "plots" / "b.png"), "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "| all | 1 | 1 | 16 |" in said
    assert "| 7 + 1 | 1 | 1 | 8 |" in said
    facts = json.loads(out.read_text())
    assert [row["visual_tokens"] for row in facts["rows"]] == [16, 8]
    assert facts["weights_bytes"] == 4 * sum(p.numel() for p in tiny_llava().parameters())
    assert (tmp_path / "plots" / "b.png").stat().st_size > 10_000


def test_a_projectors_own_split_selector_and_merge(model_folder, tmp_path, capsys, monkeypatch):
    """``--budgets 8`` of a projector trained with 5 + 3 is what it was trained with, not the paper's 7 + 1."""
    model = tiny_llava()
    model.config._name_or_path = str(model_folder)
    own = ZipConfig(dominant=5, contextual=3, selector="divprune", merge="mean")
    save(attach(model, tiny_processor(), own), tmp_path / "projector")
    seen = []
    monkeypatch.setattr("visionzip.benchmark.attach", lambda model, processor, config: seen.append(config) or attach(model, processor, config))  # fmt: skip
    arguments = ["--budgets", "8,10", "--new-tokens", "2", "--repeats", "1"]
    assert main(["benchmark", str(tmp_path / "projector"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "| 5 + 3 | 1 | 1 | 8 |" in said
    assert "| 8 + 2 | 1 | 1 | 10 |" in said
    assert {(config.selector, config.merge) for config in seen} == {("divprune", "mean")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--budgets", "16,x"], "'x' is not a budget"),
        (["--budgets", "170"], "the encoder makes 17 tokens"),
        (["--batches", "1,a"], "expected numbers such as 1,8"),
        (["--batches", "0"], "batch must be at least 1, got 0"),
        (["--new-tokens", "1"], "new tokens must be at least 2, got 1"),
        (["--image", "nowhere.png"], "nowhere.png: file missing (No such file or directory)"),
        (["--dominant", "15", "--contextual", "9"], "the encoder makes 17 tokens"),
    ],
)
def test_refusals(model_folder, capsys, change, message):
    assert main(["benchmark", str(model_folder), "--repeats", "1", *change]) == 2
    assert message in capsys.readouterr().err


def test_quantised_needs_a_gpu(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["benchmark", str(model_folder), "--quantize", "4"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
