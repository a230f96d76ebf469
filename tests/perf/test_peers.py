"""The comparison with other trainers: all of them are given the same tokens, and the table says what was left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.template import IGNORE
from scripts.benchmarks import peers
from scripts.benchmarks.presets import PRESETS
from tests.data import kit

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    peers.make_model(TINY, folder / "model")
    peers.make_records(folder / "records", 3, TINY.text["vocab_size"], TINY.vision["image_size"])
    return folder


def test_the_chat_template_gives_the_tokens_that_ours_trains_on(place: Path) -> None:
    """As TRL uses it: prompt with its images, completion behind it. Ids and supervised part are those of our data set."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(place / "model")
    data = kit.dataset(place, place / "records" / "ours.json", using=processor, max_length=4096)
    for index, row in enumerate(json.loads((place / "records" / "trl.json").read_text())):
        item = data[index]
        question = [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]
        answer = [{"type": "text", "text": row["completion"][0]["content"]}]
        prompt = [{"role": "user", "content": question}]
        before = processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = processor.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
        assert whole.startswith(before)
        expected = []
        for word in whole.replace("</s>", " </s> ").split():
            ids = processor.tokenizer.convert_tokens_to_ids([word])
            expected += ids * (TINY.full if word == "<image>" else 1)
        assert item["input_ids"].tolist() == expected
        assert processor.tokenizer.unk_token_id not in expected
        supervised = int((item["labels"] != IGNORE).sum())
        assert supervised == len(row["completion"][0]["content"].split()) + 1


def test_llama_factory_reads_the_same_conversations(place: Path) -> None:
    info = json.loads((place / "records" / "dataset_info.json").read_text())["records"]
    shared = json.loads((place / "records" / info["file_name"]).read_text())
    ours = json.loads((place / "records" / "ours.json").read_text())
    assert [row[info["columns"]["messages"]] for row in shared] == [row["conversations"] for row in ours]
    assert [Path(path).name for row in shared for path in row[info["columns"]["images"]]] == [
        row["image"] for row in ours
    ]


def test_the_table_says_who_was_left_out() -> None:
    row = {
        "samples_per_second": 2.0,
        "faster_than_peers": 1.0,
        "tokens_per_sample": 100.0,
        "peak_bytes": 2**30,
        "first_loss": 1.5,
    }
    result = {
        "preset": "tiny",
        "batch": 4,
        "steps": 2,
        "rows": {"TRL": row},
        "skipped": {"LLaMA-Factory": "pip install failed"},
    }
    shown = peers.show(result)
    assert "| TRL " in shown
    assert shown.endswith("LLaMA-Factory: left out, pip install failed")


def test_pip_s_last_words_are_in_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(RuntimeError, match="no such version"):
        peers.pip(failing, "install", "nothing")


def test_the_thin_encoder_costs_a_twentieth_of_the_llm() -> None:
    from scripts.benchmarks.flops import encoder_flops
    from scripts.benchmarks.presets import build, parameters

    preset = PRESETS["llava-1.5-7b-proportions"]
    with torch.device("meta"):
        model = build(preset, torch.device("meta"))
    llm = 4.0 * parameters(model.model.language_model.layers) * (preset.full + 220)
    assert 1 / 25 < encoder_flops(model.model.vision_tower) / llm < 1 / 16
