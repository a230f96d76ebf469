"""Where a base model comes from: a folder that was moved, a name that is none, code and pickles that nobody asked for."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.export.conftest import BUDGET
from tests.tiny import tiny_llava, tiny_processor
from visionzip import attach, load, save
from visionzip.export import read_export
from visionzip.pretrained import load_model, load_processor, read_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_hub(monkeypatch):
    """Counts what is asked of a hub, which does not answer."""
    import socket

    asked = []

    def refuse(self, address):
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return asked


def test_a_local_base_is_stored_absolute(trained, base, tmp_path, monkeypatch):
    """A relative path means something in one directory only."""
    monkeypatch.chdir(base.parent)
    trained.config._name_or_path = "base"
    out = save(trained, tmp_path / "elsewhere" / "out", metadata={"steps": 1})
    assert read_export(out).header.base_model == str(base)
    monkeypatch.chdir("/")
    load(out, "cpu")
    card = (out / "README.md").read_text()
    assert "| Base model | `base`, a local model |" in card
    assert str(base.parent) not in card  # which is for others to read


def test_a_checkout_that_was_moved(trained, base, tmp_path):
    """Export and base moved together are found again."""
    old = tmp_path / "old"
    (old / "data").mkdir(parents=True)
    base.rename(old / "data" / "base")
    trained.config._name_or_path = str(old / "data" / "base")
    save(trained, old / "runs" / "demo" / "projector")
    old.rename(tmp_path / "new")
    load(tmp_path / "new" / "runs" / "demo" / "projector", "cpu")


def test_a_base_that_is_gone_is_not_looked_for_on_the_hub(trained, base, tmp_path, no_hub):
    out = save(trained, tmp_path / "out")
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=rf"was trained on the model in {base}, which is not there; pass base="):
        load(out, "cpu")
    with pytest.raises(ValueError, match=rf"there is nothing at {base}, and it is not a hub id"):
        load(out, "cpu", base=base)
    for function in (read_config, load_model, load_processor):
        with pytest.raises(ValueError, match="there is nothing at"):
            function("./nowhere")
    assert no_hub == []


class TestCodeOfAModelsOwn:
    """transformers asks on the terminal whether to run it; a piped "y" did."""

    SCRIPT = """
import sys
from visionzip.cli import main
raise SystemExit(main(sys.argv[1:]))
"""

    @pytest.fixture
    def hostile(self, base):
        (base / "code.py").write_text(f"open({str(base / 'ran')!r}, 'w')\nfrom transformers import *\n")
        config = json.loads((base / "config.json").read_text())
        config |= {
            "model_type": "its-own",
            "auto_map": {"AutoConfig": "code.X", "AutoModelForImageTextToText": "code.Y"},
        }
        (base / "config.json").write_text(json.dumps(config))
        return base

    def test_it_is_never_run_and_nothing_is_asked(self, hostile):
        for function in (read_config, load_model):
            with pytest.raises(ValueError, match="running Python code from its own files, which is off"):
                function(hostile)
        with pytest.raises(ValueError, match=r"running Python code from its own files.*--trust-remote-code"):
            load(hostile, "cpu", config=BUDGET)
        assert not (hostile / "ran").exists()

    @pytest.mark.parametrize("command", [["inspect"], ["export", "--format", "llava", "--out", "llava-x", "--base"]])
    def test_on_the_command_line(self, hostile, trained, tmp_path, command):
        model = attach(tiny_llava(), tiny_processor(), BUDGET)
        out = save(model, tmp_path / "out")
        arguments = ["inspect", hostile] if command == ["inspect"] else [*command, hostile, out]
        done = subprocess.run(
            [sys.executable, "-c", self.SCRIPT, *map(str, arguments)],
            input="y\ny\ny\n",
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert "[y/N]" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert not (hostile / "ran").exists()


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["code", "cut", "bare", "other"])
def test_pickled_weights_of_a_base(base, tmp_path, kind):
    """Raw errors of torch and pickle, before."""
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weights = base / "pytorch_model.bin"
    Bomb.mark = tmp_path / "ran"
    torch.save({**state, "x": Bomb()} if kind == "code" else [1, 2] if kind == "other" else state, weights)
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-500])
    if kind == "bare":
        weights.write_bytes(pickle.dumps({"x": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match=rf"{base}") as caught:
        load(base, "cpu", config=BUDGET)
    assert "\n" not in str(caught.value)
    assert not Bomb.mark.exists()
