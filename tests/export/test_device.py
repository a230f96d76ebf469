"""What PyTorch computes, ONNX Runtime computes; what is given to the runtime and can't be used is one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export.conftest import ROOT
from tests.tiny import make_image
from visionzip import ZipConfig, attached
from visionzip.chat import Chat
from visionzip.device import load, read_package
from visionzip.device.pixels import to_pixels
from visionzip.export.onnx_text import reference_pixels

SIZES = ((40, 32), (56, 56), (10, 300), (1, 1), (700, 3))
BLOCKED = "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"


def images():
    return [make_image(seed, size) for seed, size in enumerate(SIZES)]


@pytest.fixture
def device_model(exported):
    return load(exported, threads=1)


def test_pixels_are_the_processors(torch_model, device_model):
    model, processor = torch_model
    expected = reference_pixels(processor, images(), attached(model).config)
    found = np.stack([to_pixels(image, device_model.package.image) for image in images()])
    assert np.abs(found - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("budget", [16, 8])
def test_the_same_tokens_are_kept_and_embedded(torch_model, device_model, budget):
    """CLIP; a batch of five, through a graph that was traced with two."""
    model, processor = torch_model
    attachment = attached(model)
    config = ZipConfig(dominant=13, contextual=3) if budget == 16 else ZipConfig(dominant=7, contextual=1)
    with torch.no_grad():
        expected = attachment.family.compress_batch(config, reference_pixels(processor, images(), config))
        embeddings = torch.stack(attachment.project(list(expected.tokens)))
    found, kept = device_model.see(images(), budget)
    assert np.array_equal(kept, expected.kept.numpy())
    assert np.abs(found - embeddings.numpy()).max() < 1e-4


def test_a_conversation_is_the_same_and_each_image_is_encoded_once(torch_model, device_model, monkeypatch):
    turns = (
        (images()[0], "What is this?"),
        (None, "What colour is it?"),
        (images()[1], "And this?"),
        (None, "Are you sure?"),
    )
    reference, chat = Chat(*torch_model, max_new_tokens=12), device_model.chat(16, limit=12)
    encoded, encode = [], device_model.encode
    monkeypatch.setattr(
        device_model, "encode", lambda shown, budget: encoded.append(len(shown)) or encode(shown, budget)
    )
    for image, question in turns:
        if image is not None:
            reference.show(image)
            chat.show(image)
        expected, written = reference.ask(question), []
        found = chat.ask(question, written.append)
        assert (found.text, found.prompt, found.prefilled) == (expected.text, expected.prompt, expected.prefilled)
        assert "".join(written) == found.text
    assert encoded == [1, 1]
    assert found.prefilled < found.prompt


def test_neither_torch_nor_transformers_is_needed(exported, tmp_path):
    images()[1].save(tmp_path / "image.png")
    script = BLOCKED + (
        "from visionzip.cli import main\n"
        "from visionzip.device import load\n"
        f"print(load({str(exported)!r}).ask({str(tmp_path / 'image.png')!r}, 'What is this?', budget=8, limit=5).text)\n"
        f"sys.exit(main(['chat', '--device', {str(exported)!r}, '--image', {str(tmp_path / 'image.png')!r}, '--max-new-tokens', '5']))"
    )
    said = "What is this?\n/budget 8\n/budget 9\n/image nowhere.png\n/exit\n"
    done = subprocess.run([sys.executable, "-c", script], input=said, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "16 visual tokens per image" in done.stdout
    assert "8 visual tokens per image; the conversation begins anew." in done.stdout
    assert "! budget 9 is not in this export, which has 16, 8; export it with --budgets" in done.stdout
    assert "! nowhere.png: file missing" in done.stdout


def test_the_example_gives_the_same_answer(exported, device_model, tmp_path):
    images()[0].save(tmp_path / "image.png")
    command = [sys.executable, ROOT / "examples/device.py", exported, tmp_path / "image.png", "What is this?", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == device_model.ask(tmp_path / "image.png", "What is this?", 8, limit=64).text.strip()


def test_graphs_share_their_weights(exported):
    """Two budgets cost one encoder: the second graph adds next to nothing to the file of weights."""
    import onnx

    def places(name):
        graph = onnx.load(exported / name, load_external_data=False).graph
        return {
            tuple(entry.value for entry in tensor.external_data) for tensor in graph.initializer if tensor.external_data
        }

    first, second = places("vision-16.onnx"), places("vision-8.onnx")
    assert len(first & second) > 0.8 * len(first)
    assert (exported / "vision-8.onnx").stat().st_size < (exported / "weights.data").stat().st_size


@pytest.mark.parametrize("shown", [Image.new("L", (9, 4000)), Image.new("RGBA", (31, 2)), Image.new("1", (1, 1))])
def test_an_image_of_any_shape_and_mode(device_model, shown):
    assert device_model.encode([shown], 8).shape[:2] == (1, 8)


def rewrite(**values):
    def change(out):
        facts = json.loads((out / "device.json").read_text())
        (out / "device.json").write_text(json.dumps(facts | values))

    return change


def garbage(name):
    """As many bytes as before, which a pickle that would run a command begins with."""

    def change(out):
        start = b"\x80\x04cos\nsystem\n"
        (out / name).write_bytes(start + bytes((out / name).stat().st_size - len(start)))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "vision-8.onnx").unlink(), "vision-8.onnx is missing"),
        (lambda out: (out / "weights.data").write_bytes(b"x"), "weights.data has 1 bytes; expected"),
        (lambda out: (out / "device.json").write_text("{"), "can't be read as JSON"),
        (lambda out: (out / "device.json").unlink(), "is not an ONNX export"),
        (rewrite(format="other/9"), "says it is 'other/9'; expected 'visionzip-onnx/1'"),
        (rewrite(budgets={"8": {"file": "../../etc/passwd", "tokens": 8}}, default="8"), "does not list it"),
        (rewrite(files={"../x": {"bytes": 1}}), "does not list it"),
        (rewrite(language={"file": "language.onnx"}), "is damaged"),
        (rewrite(default="64"), "is damaged"),
        (garbage("language.onnx"), "language.onnx can't be run by onnxruntime"),
        (garbage("tokenizer.json"), "can't be read as a tokenizer"),
    ],
)
def test_a_damaged_or_foreign_directory_is_one_sentence(exported, tmp_path, change, message):
    out = shutil.copytree(exported, tmp_path / "copy")
    change(out)
    with pytest.raises(ValueError, match=message) as caught:
        load(out)
    assert "\n" not in str(caught.value)


def test_a_listed_path_outside_of_the_directory_is_not_read(exported, tmp_path):
    out = shutil.copytree(exported, tmp_path / "copy")
    files = json.loads((out / "device.json").read_text())["files"]
    rewrite(files=files | {"../secret": {"bytes": 1}})(out)
    with pytest.raises(ValueError, match=r"names the file '\.\./secret'; only files beside it are read"):
        read_package(out)


def test_what_can_not_be_asked(device_model):
    chat = device_model.chat()
    with pytest.raises(ValueError, match="the question contains '<image>'"):
        chat.ask("What is <image>?")
    with pytest.raises(ValueError, match="the question is empty"):
        chat.ask("  ")
    with pytest.raises(ValueError, match="and the model's limit is"):
        chat.ask("why " * 5000)
    chat.show(images()[0])
    with pytest.raises(ValueError, match="the next question already has an image"):
        chat.show(images()[1])
    assert chat.turns == []


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        read_package(tmp_path / "no")
