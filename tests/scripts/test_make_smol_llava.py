"""The small LLaVA's converter, on files of the layout of the real ones; nothing is downloaded."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("gguf")

from scripts import make_smol_llava
from scripts.make_smol_llava import Wheel, fetch, main, make
from scripts.smol_llava import MissingPart, add_base, compare_vision, pack_base, read_vision
from tests.scripts.smol_parts import GRID, PATCH, SIDE, write_gguf, write_onnx
from visionzip import ZipConfig, attach


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder with vision.onnx and language.gguf, and the module that the first was exported from."""
    folder = tmp_path_factory.mktemp("parts")
    backbone = write_onnx(folder / "vision.onnx")
    write_gguf(folder / "language.gguf")
    return folder, backbone


@pytest.fixture(scope="module")
def made(parts, tmp_path_factory):
    folder, _ = parts
    out = tmp_path_factory.mktemp("made")
    return out, make(folder / "vision.onnx", folder / "language.gguf", out, SIDE, None)


@torch.no_grad()
def test_encoder_equals_what_was_exported(parts):
    folder, backbone = parts
    pixels = torch.randn(2, 3, SIDE, SIDE)
    converted = read_vision(folder / "vision.onnx", SIDE)
    assert converted.config.image_size == SIDE
    torch.testing.assert_close(converted(pixels).last_hidden_state, backbone(pixels), rtol=1e-4, atol=1e-4)
    assert compare_vision(converted, folder / "vision.onnx") < 1e-4


@torch.no_grad()
def test_positions_are_those_of_the_size_that_is_used(parts):
    """Converted for another size, or interpolated for each image: bit for bit the same."""
    folder, _ = parts
    whole, small = (read_vision(folder / "vision.onnx", side) for side in (GRID * PATCH, 56))
    pixels = torch.randn(1, 3, 56, 56)
    assert torch.equal(whole(pixels).last_hidden_state, small(pixels).last_hidden_state)


def test_a_changed_weight_is_found(parts):
    folder, _ = parts
    converted = read_vision(folder / "vision.onnx", SIDE)
    converted.encoder.layer[1].mlp.fc2.weight.data[0, 0] += 0.1
    assert compare_vision(converted, folder / "vision.onnx") > 1e-4


def test_the_directory_is_a_llava_that_can_be_compressed(made):
    out, facts = made
    assert facts["vision_difference"] < 1e-4
    assert facts["patches"] == 9
    model, processor = LlavaForConditionalGeneration.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it?"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n<image>\nWhere is it?<|im_end|>\n<|im_start|>assistant\n"
    image = torch.zeros(60, 80, 3, dtype=torch.uint8).numpy()
    inputs = processor(text=text, images=image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    attach(model, processor, ZipConfig(dominant=4, contextual=2))
    inputs = processor(text=text, images=image, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 6
    assert model(**inputs).logits.isfinite().all()


def test_files_that_can_not_be_converted_are_named(parts, tmp_path):
    folder, _ = parts
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    with pytest.raises(MissingPart, match=r"broken\.onnx can't be read as ONNX"):
        read_vision(tmp_path / "broken.onnx", SIDE)
    (tmp_path / "broken.gguf").write_bytes(b"no gguf")
    with pytest.raises(MissingPart, match=r"broken\.gguf can't be read as GGUF"):
        make(folder / "vision.onnx", tmp_path / "broken.gguf", tmp_path / "out", SIDE, None)
    assert not (tmp_path / "out").exists()


def test_trained_weights_are_put_in(made, tmp_path):
    out, _ = made
    model = LlavaForConditionalGeneration.from_pretrained(out)
    layer = "model.language_model.layers.0.self_attn.q_proj"
    bias = "model.multi_modal_projector.linear_1.bias"
    a, b = torch.randn(4, 64).bfloat16().float(), torch.randn(64, 4).bfloat16().float()
    (tmp_path / "checkpoint-7").mkdir()
    trained = {f"weight/{layer}.lora_A.default.weight": a, f"weight/{layer}.lora_B.default.weight": b}
    trained |= {f"weight/{bias}": torch.ones(64), f"exp_avg/{bias}": torch.zeros(64)}
    save_file(trained, tmp_path / "checkpoint-7" / "tensors-00000.safetensors")
    file = tmp_path / "base.safetensors"
    assert pack_base([tmp_path / "checkpoint-7"], file) == file.stat().st_size
    assert set(load_file(file)) == {f"{layer}.lora_A", f"{layer}.lora_B", bias}
    before = model.get_parameter(f"{layer}.weight").clone()
    add_base(model, file)
    torch.testing.assert_close(model.get_parameter(f"{layer}.weight"), before + 2 * b @ a)
    assert torch.equal(model.get_parameter(bias), torch.ones(64))
    twice = LlavaForConditionalGeneration.from_pretrained(out)
    pack_base([tmp_path / "checkpoint-7"] * 2, file)
    add_base(twice, file)
    torch.testing.assert_close(twice.get_parameter(f"{layer}.weight"), before + 4 * b @ a)
    with pytest.raises(MissingPart, match="is no checkpoint"):
        pack_base([tmp_path], file)
    with pytest.raises(MissingPart, match="can't be read"):
        add_base(model, tmp_path / "nothing.safetensors")
    save_file({"model.something": torch.ones(1)}, file)
    with pytest.raises(MissingPart, match="does not fit"):
        add_base(model, file)


@pytest.fixture
def wheel(tmp_path):
    """A wheel that lies in the cache, as somebody without a network puts it there."""
    path = tmp_path / "some_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_thing/file.bin", b"content")
    return Wheel("some-thing", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "some_thing/file.bin")


def test_what_was_fetched_once_needs_no_network(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    for _ in range(2):
        assert fetch(wheel, tmp_path).read_bytes() == b"content"
    assert not (tmp_path / wheel.filename).exists()


def test_another_wheel_than_the_pinned_one_is_refused(wheel, tmp_path):
    (tmp_path / wheel.filename).write_bytes(b"other")
    with pytest.raises(MissingPart, match=r"is not the file .* delete it"):
        fetch(wheel, tmp_path)
    assert not (tmp_path / wheel.file).exists()


def test_without_a_network_it_is_said_what_to_do(wheel, tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(make_smol_llava, "VISION", wheel)
    assert main(["--cache", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "could not download some-thing==1.0 (ERROR: No matching distribution found)" in said
    assert f"put {wheel.filename} into {tmp_path / 'empty'}" in said
