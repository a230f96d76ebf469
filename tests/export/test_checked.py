"""An export that was damaged, or holds what no weight can be, is refused: on load, and when it is written."""

import json
import logging
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.conftest import BUDGET
from tests.export.reseal import rewrite
from tests.export.test_refused import FILES, key
from tests.tiny import tiny_llava, tiny_processor
from visionzip import attach, load, save
from visionzip.export import load_into, read_export, save_projector
from visionzip.export.files import staged
from visionzip.inspect import describe

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=FILES)
def export(request, trained, tmp_path):
    """(name of the format, directory, the file with the tensors)"""
    options = {"vision_tower": "x"} if request.param == "llava" else {}
    out = save(trained, tmp_path / f"llava-{request.param}", request.param, **options)
    return request.param, out, out / FILES[request.param]


def test_bit_flips_in_the_tensors(export):
    """25 of 25 loaded without a word before there was a checksum."""
    name, out, file = export
    whole = file.read_bytes()
    chosen = random.Random(0)
    places = range(len(whole) // 2, len(whole))  # behind the header
    if name == "llava":  # torch's archive has bytes between the tensors that mean nothing
        weight = torch.load(file, weights_only=True)["model.mm_projector.0.weight"].numpy().tobytes()
        places = range(whole.index(weight), whole.index(weight) + len(weight))
    for _ in range(25):
        damaged = bytearray(whole)
        damaged[chosen.choice(places)] ^= 1 << chosen.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"changed after it was written|damaged"):
            load(out, "cpu")
        assert describe(out).problems
    file.write_bytes(whole)
    load(out, "cpu")
    assert not describe(out).problems


def test_a_zeroed_tail(export):
    _, out, file = export

    def zero(state):
        state[key(state, "2.weight")][-4:] = 0

    rewrite(file, zero, reseal=False)
    with pytest.raises(ValueError, match=r"was changed after it was written"):
        load(out, "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(export, value, tmp_path):
    _, out, file = export

    def spoil(state):
        state[key(state, "2.weight")][1, 2] = value

    rewrite(file, spoil)  # with a checksum that is right: it was written so
    for use in (read_export, lambda path: load(path, "cpu"), lambda path: save(path, tmp_path / "again")):
        with pytest.raises(ValueError, match=r"linear_2.weight contains 1 values that are not finite"):
            use(out)


@pytest.mark.parametrize("name", FILES)
def test_values_that_are_not_finite_are_not_written(trained, tmp_path, name):
    with torch.no_grad():
        trained.model.multi_modal_projector.linear_1.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"linear_1.bias contains 1 values that are not finite"):
        save(trained, tmp_path / "llava-x", name, **({"vision_tower": "x"} if name == "llava" else {}))
    with pytest.raises(ValueError, match="not finite"):
        save_projector(trained, tmp_path / "llava-x")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_changed_budget(export):
    """The header is what says how a projector is used; a digit in it matters as much as a weight."""
    name, out, file = export
    if name == "safetensors":
        content = file.read_bytes()
        assert content.count(b'\\"dominant\\": 5') == 1
        file.write_bytes(content.replace(b'\\"dominant\\": 5', b'\\"dominant\\": 6'))
    else:
        note = json.loads((out / "visionzip.json").read_text())
        note["zip"]["dominant"] = 6
        (out / "visionzip.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="was changed after it was written"):
        read_export(out)


def test_the_settings_of_an_adapter(adapted, tmp_path):
    out = save(adapted, tmp_path / "out", "peft")
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    with pytest.raises(ValueError, match=r"adapter_config.json was changed .*lora_alpha is 64; expected 8"):
        load(out, "cpu")


def test_frozen_weights_of_a_merged_model(trained, tmp_path):
    """Flips that the fingerprint's sample does not see."""
    out = save(trained, tmp_path / "out", "merged")

    def flip(state):
        state[key(state, "layers.0.mlp.up_proj.weight")].view(torch.int32)[1, 1] ^= 1 << 12

    rewrite(out / "model.safetensors", flip, reseal=False)
    with pytest.raises(ValueError, match=r"model.safetensors was changed after it was written"):
        load(out, "cpu")
    from transformers import AutoModelForImageTextToText

    with pytest.raises(ValueError, match=r"model.safetensors was changed after it was written"):
        AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    assert "model.safetensors was changed" in describe(out).problems[0]
    load(out, "cpu", force=True)


def test_a_file_without_a_checksum_is_used_with_one_line(export, caplog):
    name, out, file = export
    if name == "safetensors":
        rewrite(file, lambda state: None)
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            header = {key: value for key, value in opened.metadata().items() if key != "digest"}
        save_file(load_file(file), file, metadata=header)
    else:
        note = json.loads((out / "visionzip.json").read_text())
        del note["digest"]
        note.pop("files", None)
        (out / "visionzip.json").write_text(json.dumps(note))
    with caplog.at_level(logging.WARNING):
        if name == "merged":
            load(out, "cpu")
        else:
            load_into(attach(tiny_llava(), tiny_processor(), BUDGET), out)
    said = [record.message for record in caplog.records if record.name.startswith("visionzip")]
    assert said == [f"{out} has no checksum: a change since it was written would not be noticed"]
    assert describe(out).facts["Checksum"] == "none: damage would not be noticed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zip": None}, "has a header that can't be read: zip is missing"),
        ({"fingerprint": None}, "has a header that can't be read: fingerprint is missing"),
        ({"fingerprint": '{"llm": {"a": {"shape": [1]}}}'}, "fingerprint: the entry for llm: a is incomplete"),
        ({"fingerprint": '{"llm": {"a": {"shape": [1], "values": [0.5]}}}'}, "the entry for llm: a is incomplete"),
        ({"fingerprint": '{"llm": 3}'}, "fingerprint.llm: "),
        ({"zip": '{"dominant": 5}'}, "ZipConfig|was changed after it was written"),
        ({"modules": "7"}, "modules: "),
        ({"metadata": "[]"}, "metadata: "),
    ],
)
def test_a_damaged_header(trained, tmp_path, changes, message):
    out = save(trained, tmp_path / "out") / "projector.safetensors"
    from safetensors import safe_open

    with safe_open(out, "pt") as opened:
        header = {**opened.metadata(), **changes}
    save_file(load_file(out), out, metadata={key: value for key, value in header.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        load(out, "cpu")
    assert "can't be used" in describe(out).what


FULL = """
import resource, sys
from visionzip.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk(trained, tmp_path, name):
    """No file may grow beyond 3000 bytes: the exit code of a full disk, one line, and what was there is still there."""
    source = save(trained, tmp_path / "source")
    (tmp_path / "out").mkdir()
    out = save(trained, tmp_path / "out" / "llava-x")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-c", FULL, "3000", "export", str(source), "--format", name, "--out", str(out), "--overwrite"]
        + ["--vision-tower", "x"] * (name == "llava"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 74, done.stderr
    assert f"visionzip export: {out} could not be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()} == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_what_a_killed_writer_left_is_removed_and_what_it_was_replacing_restored(trained, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out = save(trained, tmp_path / "out", metadata={"steps": 1})
    (tmp_path / f".out.new.{dead.pid}").mkdir()
    (tmp_path / f".out.new.{dead.pid}" / "x").write_text("half")
    out.rename(tmp_path / f".out.old.{dead.pid}")  # killed between the two renames
    (tmp_path / f".out.new.{os.getppid()}").mkdir()  # another writer, alive
    with pytest.raises(FileExistsError, match="not empty"), staged(out):
        pass
    assert read_export(out).header.metadata == {"steps": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".out.new.{os.getppid()}", "base", "out"]
