"""The comparison with other trainers: all of them are given the same tokens, and the table says what was left out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from data.template import IGNORE
from scripts import gpu_check
from scripts.benchmarks import peer_run, peers, plan, profile
from scripts.benchmarks.peer_data import DATASET_INFO, make_model, make_records, our_config
from scripts.benchmarks.peer_environments import run_pip
from scripts.benchmarks.presets import PRESETS
from tests.data import kit
from train.config import RunConfig
from train.duration import sample_work
from train.memory import measure_model, model_without_weights

TINY = dataclasses.replace(PRESETS["tiny"], batch=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    make_model(TINY, folder / "model", torch.device("cpu"))
    make_records(TINY, folder / "records")
    return folder


def written(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / "records" / name).read_text())


def test_the_chat_template_gives_the_tokens_that_ours_trains_on(folder: Path) -> None:
    """As TRL uses it: prompt with its images, completion behind it. Ids and supervised part are those of our data set."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder / "model")
    data = kit.dataset(folder, folder / "records" / "ours.json", using=processor, max_length=4096)
    for index, row in enumerate(written(folder, "ours.json")):
        item = data[index]
        asked, answered = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
        question = [{"type": "image"}, {"type": "text", "text": asked}]
        answer = [{"type": "text", "text": answered}]
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
        assert supervised == len(answered.split()) + 1


def test_llama_factory_reads_the_same_conversations_and_images(folder: Path) -> None:
    info = DATASET_INFO["records"]
    shared, ours = written(folder, info["file_name"]), written(folder, "ours.json")
    assert [row[info["columns"]["messages"]] for row in shared] == [row["conversations"] for row in ours]
    images = [Path(path) for row in shared for path in row[info["columns"]["images"]]]
    assert [path.name for path in images] == [row["image"] for row in ours]
    assert all(path.is_file() for path in images)


def test_ms_swift_reads_the_same_conversations_and_images(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "records" / "swift.jsonl").read_text().splitlines()]
    for row, ours in zip(rows, written(folder, "ours.json"), strict=True):
        assert [turn["content"].replace("<image>", "<image>\n") for turn in row["messages"]] == [
            turn["value"] for turn in ours["conversations"]
        ]
        assert Path(row["images"][0]).name == ours["image"]


def test_with_all_tokens_ours_trains_on_the_image_features_of_the_untouched_model(folder: Path) -> None:
    """The control row has the peers' tokens, CLS left out, in their order: so the first losses have to agree."""
    from transformers import AutoModelForImageTextToText

    from visionzip import ZipConfig, attach

    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    pixels = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    expected = torch.cat(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
    attach(model, None, ZipConfig(selector="pooled", dominant=TINY.full, contextual=0))
    got = torch.cat(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
    torch.testing.assert_close(got.flatten(0, -2), expected.flatten(0, -2))


def test_our_config_is_valid(folder: Path) -> None:
    values = our_config(TINY, folder / "model", folder / "records", folder / "out", 3, {"dominant": 14}, None, True)
    config = RunConfig.model_validate(values)
    assert config.trainer.torch_compile
    assert config.model.attn_implementation == "eager"


def test_a_probe_leaves_the_first_step_out() -> None:
    found = peer_run.summarize([60.0, 2.0, 4.0, 3.0], [6.9, 6.8, 6.7, 6.6], 4000)
    assert (found["seconds"], found["first_loss"], found["tokens_per_step"]) == (3.0, 6.9, 1000)


def test_a_profile_s_shares_add_up() -> None:
    names = ["aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::mul"]
    shares = profile.share_groups({**dict.fromkeys(names, 1.0), **{f"aten::other{n}": 0.5 for n in range(8)}})
    assert shares["matrix products"] == 0.25
    assert (shares["attention, backward"], shares["attention, forward"]) == (0.125, 0.0)
    assert shares["aten::mul"] == 0.125
    assert shares["others"] == pytest.approx(3 * 0.0625)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_peak_memory_is_this_program_s() -> None:
    before = peer_run.peak_memory()
    held = bytearray(b"x" * (1 << 28))
    assert peer_run.peak_memory() > len(held)
    assert peer_run.peak_memory() >= before


def probed(seconds: float, loss: float) -> dict[str, float]:
    return {"seconds": seconds, "tokens_per_step": 800.0, "peak_bytes": 2**30, "first_loss": loss}


def test_the_table_compares_with_the_better_peer_and_says_what_was_left_out() -> None:
    rounds = {
        "TRL": [probed(8.0, 6.93), probed(9.0, 6.93)],
        "LLaMA-Factory": [probed(4.0, 6.93)],
        "ours, all tokens": [probed(2.0, 6.95)],
        "ours": [probed(1.0, 5.0)],
    }
    rows = peers.summarize(rounds, batch=8)
    assert rows["TRL"]["samples_per_second"] == 1.0
    assert [row["times_the_better_peer"] for row in rows.values()] == [0.5, 1.0, 2.0, 4.0]
    difference = peers.loss_difference(rows)
    assert difference == {"all tokens": pytest.approx(0.02)}  # a single compressed row has nothing to agree with
    shown = peers.show(
        {
            "preset": "tiny", "batch": 8, "steps": 4, "dtype": "torch.float32", "rows": rows, "loss_difference": difference,
            "skipped": {"ours, compiled": "no compiler"},
        }
    )  # fmt: skip
    assert "| ours, all tokens | 4.000     | 2.00x " in shown
    assert "first losses with all tokens differ by at most 2.0e-02" in shown
    assert shown.endswith("ours, compiled: left out, no compiler")


def test_pip_s_last_words_are_in_the_error(tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(RuntimeError, match="no such version"):
        run_pip(failing, "install", "nothing")


def test_the_gpu_check_compares_with_trl_where_it_is_given_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parts(wheels: Path | None) -> dict:
        return gpu_check.parts(torch.device("cpu"), True, 0.0, tmp_path, wheels)

    seen = []
    monkeypatch.setattr(peers, "run", lambda setting, rounds, only: seen.append((setting, only)) or {})
    assert "peers" not in parts(None)
    parts(tmp_path)["peers"][0]()
    ((setting, only),) = seen
    assert (setting.wheels, setting.shapes.batch) == (tmp_path, gpu_check.PEER_BATCH)
    assert set(only) <= peers.ROWS.keys()


def test_what_a_row_runs_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers read all tokens unless they are compressed by attach; ours, the same, by its config; each with its own Python."""
    monkeypatch.setattr(peers, "make_environment", lambda peer, folder, wheels: tmp_path / peer.kind)
    ran = {}
    monkeypatch.setattr(
        peers, "run_probed", lambda kind, python, spec: ran.setdefault(Path(spec["out"]).name, (kind, python, spec))
    )
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **options: ran.setdefault("cache", command))
    setting = peers.Setting("tiny", tmp_path / "work", tmp_path / "environments", steps=2)
    for label, row in peers.ROWS.items():
        peers.run_row(setting, row, label)
    assert ran["TRL"][:2] == ("trl", tmp_path / "trl")
    assert ran["TRL"][2]["zip"] is None
    assert ran["TRL-with-attach"][2]["zip"] == {"dominant": 14, "contextual": 3}
    configs = {name: json.loads(Path(ran[name][2]["config"]).read_text()) for name in ran if name.startswith("ours")}
    assert {name: config["zip"]["dominant"] for name, config in configs.items()} == {
        "ours-all-tokens": 100, "ours": 14, "ours-token-cache": 14, "ours-compiled": 14, "ours-token-cache-compiled": 14,
    }  # fmt: skip
    assert [name for name, config in configs.items() if config["data"]["cache"]] == [
        "ours-token-cache", "ours-token-cache-compiled",
    ]  # fmt: skip
    assert ran["cache"][2] == "data.cache"
    outer = peers.Setting("tiny", tmp_path, tmp_path, steps=2, wheels=tmp_path)
    assert (setting.python, outer.python) == (Path(sys.executable), tmp_path / "trl")


def test_the_plan_s_time_stands_beside_a_run_of_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7.2 TFLOP/s for work that is counted, and a run that is twice as slow as that."""
    config = our_config(TINY, tmp_path / "work" / "model", tmp_path, tmp_path / "out", 2, {"dominant": 14}, None)
    seen = []

    def slow(python: Path, values: dict, spec: dict) -> dict:
        seen.append(values)
        model = model_without_weights(RunConfig.model_validate(values), tmp_path)
        valid = RunConfig.model_validate(values)
        work = sample_work(model, valid, measure_model(model, valid), 250)
        return {"seconds": 2 * TINY.batch * work.total / 7.2e12, "tokens_per_step": 250 * TINY.batch}

    monkeypatch.setattr(plan, "run_ours", slow)
    monkeypatch.setattr(plan, "measure_rate", lambda model, config, samples, length: 7.2e12)
    result = plan.run(peers.Setting("tiny", tmp_path / "work", tmp_path, steps=2, batch=TINY.batch))
    assert [row["off"] for row in result["rows"].values()] == pytest.approx([-0.5, -0.5])
    assert result["rows"]["from pixels"]["measured"] > result["rows"]["from the token cache"]["measured"]
    assert [values["data"]["cache"] is not None for values in seen] == [False, True]
    assert seen[0]["trainer"] == config["trainer"]
    assert "-50 %" in plan.show(result)


def test_the_thin_encoder_costs_a_twentieth_of_the_llm() -> None:
    from scripts.benchmarks.flops import encoder_flops
    from scripts.benchmarks.presets import build, parameters

    preset = PRESETS["llava-1.5-7b-proportions"]
    model = build(preset, torch.device("meta"))
    llm = 4.0 * parameters(model.model.language_model.layers) * (preset.full + 220)
    assert 1 / 25 < encoder_flops(model.model.vision_tower) / llm < 1 / 16
