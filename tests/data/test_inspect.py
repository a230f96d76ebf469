"""`python -m data.inspect` says what training would do with the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data.commands import cache, inspect
from data.config import TRAINING_SECTIONS, PipelineConfig, load_config
from data.inspect.report import render_histogram
from data.inspect.samples import colour_tokens
from data.inspect.survey import Facts, Survey, survey
from data.partial import load_without
from data.sample import Rejection
from tests.data import kit
from tests.tiny import tiny_llava, tiny_processor
from train.config import RunConfig
from train.config import load_config as run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, 40 good records and two bad ones, and a training config with sections this command does not know."""
    folder = tmp_path_factory.mktemp("inspect")
    tiny_llava().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    image = kit.write_image(folder / "a.png")
    rows = [kit.record(n, image if n % 2 else None, answer="a red circle " * (1 + n % 5)) for n in range(40)]
    rows += [kit.record(40, "absent.png"), {"id": "r3", "conversations": []}]
    config = {
        "output_dir": "runs/x",
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "zip": {"dominant": 5, "contextual": 2},
        "data": {
            "sources": [{"path": kit.write_json(folder / "a.json", rows)}],
            "template": "llava_v1",
            "max_length": 64,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {"learning_rate": 1e-3},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(folder: Path, capsys, *arguments: str) -> tuple[int, str, str]:
    code = inspect.main(
        ["--config", str(folder / "c.yaml"), "--out", str(folder / "out"), "--workers", "0", *arguments]
    )
    out, err = capsys.readouterr()
    return code, out, err


def test_everything_is_said(folder, capsys):
    code, out, _ = run(folder, capsys, "--samples", "8", "data.max_rejected=0")
    assert code == 1, "2 of 42 are bad"
    for expected in (
        "42 read, 100.0% of an epoch: 40 used, 2 rejected",
        "file missing",
        "absent.png",
        "empty conversation",
        "4.76% rejected; data.max_rejected is 0.00% and allows 0 of 42: a run would stop",
        "[image 1: 7 tokens]",
        "tokens per sample",
    ):
        assert expected in out
    numbers = json.loads((folder / "out" / "inspect.json").read_text())
    assert (numbers["read"], numbers["used"], numbers["rejected"]) == (
        42,
        40,
        {"file missing": 1, "empty conversation": 1},
    )
    assert numbers["per_sample"]["image"]["sum"] == 20 * 7
    rejected = [json.loads(line) for line in (folder / "out" / "rejected.jsonl").read_text().splitlines()]
    assert sorted(rejection["index"] for rejection in rejected) == [40, 41]
    assert Image.open(folder / "out" / "inspect.png").size == (1320, 900)


def test_a_few_bad_records_of_a_small_set_stop_nothing_as_in_training(folder, capsys):
    for limit in ("42", "5"):
        code, out, _ = run(folder, capsys, "--limit", limit)
        assert code == 0
        assert "allows 2 of 42: a run would go on" in out or "nothing would be rejected" in out


def test_overrides_and_a_limit(folder, capsys):
    code, out, _ = run(folder, capsys, "--limit", "10", "--samples", "0", "data.max_rejected=1.0", "--uncompressed")
    assert code == 0
    assert "10 read, 23.8% of an epoch" in out
    numbers = json.loads((folder / "out" / "inspect.json").read_text())
    assert numbers["per_sample"]["image"]["max"] == 16, "all patches"


def test_the_numbers_are_those_of_the_items(folder):
    """The survey counts what training gets, token for token."""
    config = load_config(folder / "c.yaml")
    data = kit.build_dataset(config.data, inspect.prepare_processor(config), 0)
    image = data.encoder.processor.tokenizer.convert_tokens_to_ids("<image>")
    result = [survey_ for survey_, _ in survey(data, None, 0)][-1]
    items = {data.sample(index).id: data[index] for index in range(40)}
    assert len(result.facts) == 40
    for facts in result.facts:
        item = items[facts.id]
        assert facts.total == len(item["input_ids"])
        assert facts.image == int((item["input_ids"] == image).sum())
        assert facts.supervised == int((item["labels"] != -100).sum())
        assert facts.images == len(item.get("pixel_values", ()))


@pytest.mark.parametrize("zip_section", ["zip: {}", ""])
def test_a_config_without_a_budget_has_the_default_one_as_in_training(folder, capsys, zip_section):
    """54 + 10 would be more than this model's 16 patches: what training refuses is refused here, too, and not counted without."""
    plain = yaml.safe_load((folder / "c.yaml").read_text())
    del plain["zip"]
    (folder / "no-budget.yaml").write_text(yaml.safe_dump(plain) + zip_section)
    assert load_config(folder / "no-budget.yaml").zip == run_config(folder / "no-budget.yaml").zip
    code, _, err = run(folder, capsys, "--config", str(folder / "no-budget.yaml"))
    assert code == 2
    assert "54" in err


def test_a_token_cache_of_another_budget_is_refused(folder, capsys, tmp_path):
    """Its tokens would be counted where training refuses it."""
    tokens = f"data.cache={tmp_path / 'tokens'}"
    assert cache.main(["--config", str(folder / "c.yaml"), "--workers", "0", tokens]) == 0
    capsys.readouterr()
    code, out, _ = run(folder, capsys, tokens)
    assert code == 0
    assert "42 read" in out
    code, out, err = run(folder, capsys, tokens, "zip.dominant=4")
    assert (code, out) == (2, "")
    assert "zip.dominant: 5 there, 4 here" in err
    code, out, err = run(folder, capsys, tokens, "--uncompressed")
    assert (code, out) == (2, "")
    assert "add data.cache=null" in err


def test_the_sections_on_training_are_left_to_training_and_no_others(folder, capsys):
    assert set(RunConfig.model_fields) == {*PipelineConfig.model_fields, *TRAINING_SECTIONS}
    code, _, err = run(folder, capsys, "trianer.seed=1")
    assert code == 2
    assert "trianer: no such key" in err


def test_code_of_the_model_directory_is_never_run_unasked(folder, tmp_path, capsys, monkeypatch):
    """Nor is it asked about on the terminal, where a piped `y` would do."""
    shutil.copytree(folder / "model", tmp_path / "model")
    ran = tmp_path / "ran"
    (tmp_path / "model" / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    for name, kind in (("config.json", "AutoConfig"), ("processor_config.json", "AutoProcessor")):
        file = tmp_path / "model" / name
        content = json.loads(file.read_text()) | {"auto_map": {kind: "code.Config"}, "model_type": "unheard-of"}
        file.write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with open(tmp_path / "yes", "w+") as yes:
        yes.write("y\n")
        yes.seek(0)
        monkeypatch.setattr("sys.stdin", yes)
        code, _, err = run(folder, capsys, f"model.path={tmp_path / 'model'}")
        assert code == 2
        assert "trust_remote_code" in err
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_without(str(tmp_path / "model"), ["llm"])
        given = [
            "--config",
            str(folder / "c.yaml"),
            f"data.cache={tmp_path / 'tokens'}",
            f"model.path={tmp_path / 'model'}",
        ]
        assert cache.main(given) == 2
        assert "trust_remote_code" in capsys.readouterr().err
    assert not ran.exists()


def facts(number: int, before: int = 0, name: str | None = None) -> Facts:
    return Facts(name or f"r{number}", "a", 10 + number, 0, 5, 0, 1, max(before, 10 + number))


def test_what_is_cut_and_what_shares_an_id():
    result = Survey([facts(0), facts(1, before=99), facts(2, name="x"), facts(3, name="x")])
    result.add(Rejection("r9", "a", 9, "no answer"))
    assert [cut.id for cut in result.cut] == ["r1"]
    assert result.duplicates() == 2
    assert result.rejected == pytest.approx(0.2)
    assert np.array_equal(result.column("total"), [10, 11, 12, 13])


@pytest.mark.parametrize("count", [1, 3])
def test_a_histogram_of_samples_of_one_length(count):
    text = render_histogram(Survey([facts(0, name=f"r{n}") for n in range(count)])).plain
    assert f"10 – 11 {'▒' * 60} {count}" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.template=vicuna"], "there is no template 'vicuna'"),
        (["data.sources.0.fractions=0.1"], "sources.0.fractions"),
        (["zip.dominant=5000"], "dominant"),
        (["model.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["data.sources.0.path=/nowhere/a.json"], "there is no file /nowhere/a.json"),
    ],
)
def test_a_mistake_in_the_config_is_one_message(folder, capsys, overrides, message):
    code, out, err = run(folder, capsys, *overrides)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_samples_show_what_is_supervised_and_images_as_notes(tmp_path):
    kit.write_image(tmp_path / "a.png")
    data = kit.dataset(tmp_path, kit.write_json(tmp_path / "a.json", [kit.record(0, "a.png", answer="2 cats.")]))
    encoded, _, _ = data.encoder.encode(data.sample(0))
    text = colour_tokens(data.encoder.template.tokenizer, encoded)
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans if span.style}
    assert styles == {"[image 1: 16 tokens]": "bold magenta", " 2 cats.</s>": "bold green"}
    assert "USER: [image 1: 16 tokens] \nWhat is it? ASSISTANT: 2 cats.</s>" in text.plain


def test_what_records_hold_does_not_steer_the_terminal(folder, tmp_path, capsys):
    """Markup of the report's own, escape sequences and half a surrogate pair, in names, ids, texts and reasons."""
    nasty = "[/red] \x1b[2J \x9b \ud83d"
    rows = [kit.record(0, answer="[/red] \x1b[2J fine"), {**kit.record(1), "id": nasty}, {"id": nasty, nasty: 1}]
    path = kit.write_json(tmp_path / "a.json", rows)
    source = f"data.sources=[{{path: {path}, name: '[/b]'}}]"
    code, out, _ = run(folder, capsys, source, "data.max_rejected=1")
    assert code == 0
    assert "\x9b" not in out
    assert "\x1b[2J" not in out
    assert out.count("[/red]") >= 2
    assert "[/b]" in out


def test_a_stream_is_looked_at_up_to_the_limit(folder, capsys):
    changes = ["data.sources.0.streaming=true", "data.max_rejected=1.0"]
    code, out, _ = run(folder, capsys, "--limit", "20", *changes)
    assert code == 0
    assert "20 read:" in out
    assert "stream" in out
    code, _, err = run(folder, capsys, "--all", *changes)
    assert code == 2
    assert "a stream has no end: give a limit" in err
