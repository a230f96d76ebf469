"""Bad input to any command is one clear line on stderr and exit code 2, before or after a model is loaded."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad")
    tiny_llava().save_pretrained(place / "model")
    tiny_processor().save_pretrained(place / "model")
    (place / "photos").mkdir()
    make_image(0).save(place / "photos" / "a.png")
    (place / "empty").mkdir()
    (place / "text.txt").write_text("x")
    (place / "list.json").write_text("[1]")
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{")
    return place


LOOK = {
    "visualize": ["model", "photos"],
    "analyze": ["model", "photos", "--out", "analysis"],
    "benchmark": ["model", "--repeats", "1"],
    "chat": ["model"],
    "app": ["model"],
}
OPTIONS = ["--device nope", "--dtype nope", "--layer x", "--layer 99", "--selector nope", "--budget x", "--budget 9999",
           "--budget all", "--budget 8 --dominant 3", "--dominant 0", "--base nowhere", "--nonsense"]  # fmt: skip
OTHERS = [
    "visualize model nowhere", "visualize model empty", "visualize model photos --limit 0", "visualize model clip.mp4",
    "visualize model photos --out /proc/x/y.html", "analyze model photos --out photos", "analyze model photos --out text.txt",
    "benchmark model --budgets 8,x",
    "benchmark model --budgets ", "benchmark model --batches x", "benchmark model --json photos", "benchmark model --plot x.nope",
    "benchmark model --image text.txt", "benchmark model --new-tokens 0", "chat model --image nowhere", "chat model --temperature nan",
    "app model --port 99999", "app model --host nowhere.invalid", "app model --image text.txt", "inspect nowhere",
    "export model --out x", "export nowhere --out x", "export model --out x --format nope", "export text.txt --out x",
    "push nowhere a/b", "push model a/b", "table nowhere", "table list.json", "table a=photos a=photos",
    *[f"{command} {model} photos" for command in ("visualize", "analyze") for model in ("nowhere", "empty", "broken", "text.txt", "photos")],
]  # fmt: skip


def refused(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    try:
        code = main(command)
    except SystemExit as left:  # argparse, which prints the usage too
        code = left.code
    error = capsys.readouterr().err
    said = error[error.rindex("visionzip ") :].splitlines() if "usage: " in error else error.splitlines()
    assert code == 2, error
    assert len(said) == 1, error
    assert said[0].startswith(f"visionzip {command[0]}: ")
    return said[0]


@pytest.mark.parametrize(
    ("command", "options"),
    [(command, options) for command in LOOK for options in OPTIONS if (command, options) != ("chat", "--budget all")],
)
def test_options_for_a_model(command, options, place, monkeypatch, capsys):
    refused([command, *LOOK[command], *options.split()], place, monkeypatch, capsys)


@pytest.mark.parametrize("command", OTHERS)
def test_everything_else(command, place, monkeypatch, capsys):
    refused(command.split(" "), place, monkeypatch, capsys)


def test_a_selector_that_does_not_exist_lists_those_that_do(place, monkeypatch, capsys):
    said = refused(["chat", "model", "--selector", "nope"], place, monkeypatch, capsys)
    for name in ("visionzip", "divprune", "coverage", "random", "vispruner"):
        assert f"'{name}'" in said


EVIL = """
from pathlib import Path
from transformers import PretrainedConfig
Path(r"{}").write_text("ran")
class EvilConfig(PretrainedConfig):
    model_type = "evil"
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(trusted, place, tmp_path):
    """Without --trust-remote-code nothing asks on the terminal either, where a piped "y" was an answer."""
    evil, ran = tmp_path / "evil", tmp_path / "ran"
    evil.mkdir()
    (evil / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}')
    (evil / "evil.py").write_text(EVIL.format(ran))
    command = [sys.executable, "-m", "visionzip", "visualize", str(evil), str(place / "photos")]
    done = subprocess.run(
        command + ["--trust-remote-code"] * trusted, input="y\ny\n", cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 2
    assert ran.exists() is trusted
    assert done.stdout == ""
    if not trusted:
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.rstrip().endswith(
            "pass trust_remote_code=True (--trust-remote-code; model.trust_remote_code=true in a config) if you trust it"
        ), done.stderr
