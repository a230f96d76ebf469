"""Push and pull through the command line and huggingface_hub's own client, against a stand-in on 127.0.0.1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.export.conftest import answers
from tests.export.hub_stand_in import TOKEN, running
from tests.tiny import make_image, tiny_processor
from visionzip import ZipConfig, attached, load, save
from visionzip.export.card import describe_budgets
from visionzip.hub import looks_like_id
from visionzip.loading import save_result

ROOT = Path(__file__).parents[2]
RESULTS = {
    "full": 0.987,
    "training_free": 0.839,
    "fine_tuned": 0.934,
    "tokens": 8,
    "of_tokens": 17,
    "questions": 2000,
    "seed": 0,
}
METADATA = {"data": ["a tenth of a mix"], "steps": 519, "results": RESULTS}


@pytest.fixture
def hub():
    with running() as hub:
        yield hub


DRIVER = """
import contextlib, io, json, sys
from visionzip.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture
def outside(hub, tmp_path):
    """Run `visionzip` commands, then a script, in a process of its own that knows only the stand-in."""

    def run(*commands, then="", **changes):
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",  # its storage is another protocol; the plain one is what is stood in for
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **changes,
        }
        arguments = json.dumps([[str(word) for word in command] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", DRIVER + then, arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[0])

    return run


LOAD = """
import torch, visionzip
from tests.export.conftest import answers
torch.save(answers(*visionzip.load("somebody/ft", "cpu")), "logits.pt")
"""


def test_push_pull_load(trained, base, hub, outside, tmp_path):
    save(trained, tmp_path / "out", metadata=METADATA)
    (tmp_path / "out" / "README.md").unlink()  # as a run leaves it
    push = ("push", tmp_path / "out", "somebody/ft", "--private", "--message", "the first")
    pushed, pulled = outside(push, ("pull", "somebody/ft", "--out", tmp_path / "theirs"), then=LOAD)
    assert pushed[0] == 0
    assert pushed[1].startswith(f"{hub.url}/somebody/ft/commit/")
    assert hub.private == {"somebody/ft"}
    assert hub.messages == ["the first"]
    assert sorted(hub.repos["somebody/ft"]["main"]) == ["README.md", "projector.safetensors"]
    assert 'visionzip.load("somebody/ft")' in hub.repos["somebody/ft"]["main"]["README.md"].decode()
    assert len(hub.lfs) == 1  # the tensors went the way of large files

    assert pulled[0] == 0
    assert "a projector fine-tuned with visionzip-ft" in pulled[1]
    one, two = (load_file(tmp_path / name / "projector.safetensors") for name in ("out", "theirs"))
    assert all(torch.equal(one[name], two[name]) for name in one)

    expected = answers(trained, attached(trained).processor)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    (tmp_path / "logits.pt").unlink()
    hub.requests.clear()
    outside(then=LOAD, HF_HUB_OFFLINE="1")  # from the cache, without asking
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert hub.requests == []


def test_a_merged_model_loads_from_the_hub(trained, hub, outside, tmp_path):
    trained.config._name_or_path = "llava-hf/llava-1.5-7b-hf"
    save(trained, tmp_path / "out", "merged", metadata=METADATA)
    script = """
from transformers import AutoModelForImageTextToText, AutoProcessor
import visionzip
model = AutoModelForImageTextToText.from_pretrained("somebody/merged", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("somebody/merged", trust_remote_code=True)
assert visionzip.attached(model).config.dominant == 5
assert processor.replace_image_token({}, 0).count("<image>") == 8
"""
    push = ("push", tmp_path / "out", "somebody/merged")
    for code, _, error in outside(push, (*push, "--revision", "try"), then=script):
        assert code == 0, error
    assert hub.repos["somebody/merged"]["try"] == hub.repos["somebody/merged"]["main"]
    card = hub.repos["somebody/merged"]["main"]["README.md"].decode()
    for part in (
        "base_model: llava-hf/llava-1.5-7b-hf\n",
        "# llava-1.5-7b-hf, 8 visual tokens (5 dominant + 3 contextual)",
        "| Data | a tenth of a mix |",
        "| Steps | 519 |",
        "| all tokens | 98.7 % | 17 |",
        "| compressed, not trained | 83.9 % | 8 |",
        "| compressed, fine-tuned | 93.4 % | 8 |",
        "On 2,000 held-out questions, seed 0.",
        'from_pretrained("somebody/merged", trust_remote_code=True)',
        "pip install visionzip-ft",
    ):
        assert part in card
    assert "<this directory>" not in card


def test_no_card_claims_what_was_not_measured(trained, tmp_path):
    text = (save(trained, tmp_path / "out") / "README.md").read_text()
    assert "Nothing was measured when this was exported." in text
    assert "| Data | not recorded |" in text


def test_refusals_are_one_line_each(trained, outside, tmp_path):
    tiny_processor().save_pretrained(tmp_path / "plain")
    save(trained, tmp_path / "out")
    half = save(trained, tmp_path / "half", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (half / name).unlink()
    damaged = save(trained, tmp_path / "damaged") / "projector.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    cases = {
        (
            "push",
            half,
            "a/b",
        ): "is not a complete export: it lacks the trained weights, and contains only README.md, visionzip.json",
        ("push", damaged.parent, "a/b"): "is damaged",
        ("push", tmp_path / "plain", "a/b"): "was not written by visionzip export",
        ("push", tmp_path / "nowhere", "a/b"): "was not written by visionzip export",
        ("push", tmp_path / "out", "a/b"): "a/b: the hub refused: ",
        ("push", tmp_path / "out", "not a name"): "not a name: the hub refused: ",
        ("pull", "nobody/nothing"): "nobody/nothing can't be downloaded",
        ("inspect", "nobody/nothing"): "the hub has no model of that name",
    }
    alone = {
        ("pull", "nobody/nothing"): "nobody/nothing: the hub can't be reached and nothing of it is in the cache",
        ("inspect", "nobody/nothing"): "the hub can't be asked, and its cache has no model of that name",
    }
    for expected, changes in ((cases, {"HF_TOKEN": "wrong"}), (alone, {"HF_ENDPOINT": "http://127.0.0.1:9"})):
        for (code, _, error), message in zip(outside(*expected, **changes), expected.values(), strict=True):
            assert code == 2
            assert message in error
            assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", True),
        ("./x", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("name", False),
        ("~/x", False),
        ("tests/x", False),
    ],
)
def test_what_looks_like_an_id(text, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert looks_like_id(text) == expected
    assert not looks_like_id(Path(text))


FROM_THE_REPOSITORY = """
import argparse, re
from pathlib import Path
from huggingface_hub import hf_hub_download
from PIL import Image
from visionzip.app.looker import Looker
from visionzip.app.ui import build
from visionzip.commands import _model, app

Image.new("RGB", (72, 72), "red").save("photo.jpg")
card = Path(hf_hub_download("somebody/run", "README.md")).read_text()
said = io.StringIO()
with contextlib.redirect_stdout(said):
    exec(re.search(r"```python\\n(.*?)```", card, re.S)[1])  # its code for transformers
assert said.getvalue().strip() and visionzip.attached(model).config.dominant == 13

parser = argparse.ArgumentParser()
app.add_arguments(parser)
model, processor = _model.load(parser.parse_args(["somebody/run", "--budget", "8"]))
looker = Looker(model, processor)
assert looker.trained_budgets() == [(7, 1), (13, 3)]
build(looker, "somebody/run", hf_hub_download("somebody/run", "kept.png"))
assert looker.answers(looker.look("photo.jpg"), "what colour is it?", looker.config, length=2).tokens == 8
"""


def test_a_pushed_run_is_a_repository_that_works_alone(hub, outside, tmp_path):
    """Card with table, image and usage; its own code and the app's page run from what is on the hub."""
    base, run = ROOT / "data" / "tiny-llava", tmp_path / "run"
    hub.repos["somebody/base"] = {"main": {path.name: path.read_bytes() for path in base.iterdir()}}
    config = ZipConfig.model_validate({"dominant": 13, "contextual": 3, "budgets": [8, 16]})
    model, _ = load(base, "cpu", "float32", config=config)
    model.config._name_or_path = "somebody/base"
    measured = {**RESULTS, "tokens": 16, "of_tokens": 81, "budgets": {"8": 0.701, "16": 0.934}}
    save_result(model, run, "safetensors", {**METADATA, "results": measured})
    (run / "config.yaml").write_text("{}\n")
    (run / "report").mkdir()
    make_image(1, (40, 40)).save(run / "report" / "kept_0.png")

    export = ("export", run, "--out", tmp_path / "copy")
    for code, _, error in outside(("push", run, "somebody/run"), export, then=FROM_THE_REPOSITORY):
        assert code == 0, error
    there = hub.repos["somebody/run"]["main"]
    assert sorted(there) == ["README.md", "kept.png", "projector.safetensors"]
    assert there["kept.png"] == (run / "report" / "kept_0.png").read_bytes()
    for part in (
        "base_model: somebody/base\n",
        "| Trained for | 7 + 1 or 13 + 3 tokens |",
        "| all tokens | 98.7 % | 81 |",
        "| compressed, fine-tuned | 93.4 % | 16 |",
        "| compressed to 8, fine-tuned | 70.1 % | 8 |",
        "(kept.png)",
        "`visionzip serve somebody/run`",
        "`visionzip export somebody/run --format onnx --out onnx`",
        "visionzip.set_budget(model, 32)",
    ):
        assert part in there["README.md"].decode()
    # A copy in another format has the image too; a card that somebody edited stays as it is.
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(there)
    assert "(kept.png)" in (tmp_path / "copy" / "README.md").read_text()
    (tmp_path / "copy" / "README.md").write_text("---\ntags: [mine]\n---\nEdited, for <this directory>.\n")
    assert outside(("push", tmp_path / "copy", "somebody/edited"))[0][0] == 0
    assert hub.repos["somebody/edited"]["main"]["README.md"].decode().endswith("Edited, for somebody/edited.\n")


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ([8, 16, 32], "7 + 1, 13 + 3 or 27 + 5 tokens"),
        ({"least": 8, "most": 64}, "7 + 1 to 54 + 10 tokens"),
        ([0.1], "0.084375 + 0.015625 of the visual tokens"),
    ],
)
def test_trained_budgets_in_words(budgets, expected):
    config = ZipConfig.model_validate({"dominant": 13, "contextual": 3, "budgets": budgets})
    assert describe_budgets(config) == expected
