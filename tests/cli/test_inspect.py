"""`visionzip inspect` on everything this project writes, whole and damaged, and on what it does not know."""

import json
import shutil

import pytest
import torch
from PIL import Image

from data.cache import claim, identity
from data.cache.shards import Writer as TokenWriter
from data.config import DataConfig
from tests.export.conftest import add_lora
from tests.tiny import tiny_llava, tiny_processor
from train.checkpoint import Writer
from visionzip import ZipConfig, attach, save
from visionzip.cli import main
from visionzip.inspect import format_size

BUDGET = ZipConfig(dominant=5, contextual=3)
RESULTS = {
    "full": 0.987,
    "training_free": 0.839,
    "fine_tuned": 0.934,
    "tokens": 8,
    "of_tokens": 16,
    "questions": 2000,
    "seed": 0,
}


@pytest.fixture
def model(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    model = tiny_llava()
    model.config._name_or_path = str(tmp_path / "base")
    return attach(model, tiny_processor(), BUDGET)


@pytest.fixture
def inspect(capsys):
    """What is printed, with the layout's spaces and line breaks taken out."""

    def run(path, code=0):
        assert main(["inspect", str(path)]) == code
        printed = capsys.readouterr()
        assert max(map(len, printed.out.splitlines()), default=0) < 200
        return " ".join((printed.out + printed.err).split())

    return run


def test_a_projector(model, tmp_path, inspect):
    out = save(
        model,
        tmp_path / "out",
        metadata={"data": ["a tenth"], "steps": 519, "trained": "projector", "results": RESULTS},
    )
    said = inspect(out)
    for part in (
        "is a projector fine-tuned with visionzip-ft.",
        f"Base model {tmp_path / 'base'}",
        "Budget 8 visual tokens (5 dominant + 3 contextual)",
        "Data a tenth",
        "Steps 519",
        "Measured all tokens 98.7 %, compressed 83.9 %, fine-tuned 93.4 % (of 2,000 questions)",
        "Parameters 3,936 in 4 tensors, float32",
        "(checked when it is loaded)",
        f"visionzip chat {out} --image photo.jpg",
    ):
        assert part in said
    assert inspect(out / "projector.safetensors").startswith(f"{out}/projector.safetensors is a projector")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("llava", "a projector for LLaVA's own loader"),
        ("merged", "a whole model with a fine-tuned projector"),
        ("peft", "a PEFT adapter"),
    ],
)
def test_other_formats(model, tmp_path, inspect, name, what):
    options = {"vision_tower": "x"} if name == "llava" else {}
    assert f"is {what}" in inspect(save(model, tmp_path / "llava-x", name, **options))


def test_adapters(model, tmp_path, inspect):
    assert "fine-tuned projector, and 4 LoRA adapters." in inspect(
        save(add_lora(model, ["q_proj", "v_proj"]), tmp_path / "x", "peft")
    )


def test_damaged_exports(model, tmp_path, inspect):
    out = save(model, tmp_path / "out")
    file = out / "projector.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "meant to be a projector fine-tuned with visionzip-ft, but can't be used" in inspect(out)
    assert "Problem" in inspect(out)


def test_a_merged_model_with_a_damaged_config(model, tmp_path, inspect):
    out = save(model, tmp_path / "out", "merged")
    (out / "config.json").write_text("{")
    assert f"Problem: {out}/config.json can't be read as JSON" in inspect(out)


def test_models(model, tmp_path, inspect):
    said = inspect(tmp_path / "base")
    assert "is a model, LlavaForConditionalGeneration." in said
    assert "encoder 32.5 k, llm 42.7 k, projector model.multi_modal_projector 3,936" in said
    assert "Visual tokens per image 16" in said
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "processor_config.json").unlink()
    said = inspect(tmp_path / "base")
    assert "there are no weights in it" in said
    assert "there is no processor in it" in said
    model.save_pretrained(tmp_path / "attached")  # transformers' own save of a compressed model
    assert "that was compressed with VisionZip" in inspect(tmp_path / "attached")


def test_a_model_that_can_not_be_compressed(tmp_path, inspect):
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "x")
    said = inspect(tmp_path / "x")
    assert "LlamaForCausalLM, which this toolkit can't compress" in said
    assert "llava" in said
    (tmp_path / "x" / "config.json").write_text("{}")
    assert "a config.json that transformers can't read" in inspect(tmp_path / "x")


class TestCheckpoint:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        writer = Writer(tmp_path / "run", 4)
        writer.tensor("weight/a", torch.ones(100))
        progress = {"step": 4, "epoch": 1.33, "max_steps": 6, "world_size": 2, "batch": [2, 4]}
        writer.json("progress.json", progress)
        return writer.commit()

    def test_complete(self, checkpoint, inspect):
        said = inspect(checkpoint)
        assert "is a complete checkpoint of a run." in said
        assert "Step 4 of 6 (epoch 1.33)" in said
        assert f"trainer.resume={checkpoint}" in said

    def test_damaged(self, checkpoint, inspect):
        tensors = checkpoint / "tensors-00000.safetensors"
        whole = tensors.read_bytes()
        flipped = bytearray(whole)
        flipped[-3] ^= 1
        for content, message in (
            (bytes(flipped), "was changed after it was written (its checksum differs)"),
            (whole[:-1], f"bytes; expected {len(whole):,}"),
        ):
            tensors.write_bytes(content)
            said = inspect(checkpoint)
            assert "is a damaged checkpoint, which resuming skips." in said
            assert message in said
        tensors.unlink()
        assert "tensors-00000.safetensors is missing" in inspect(checkpoint)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        del manifest["files"][tensors.name]  # a list that hides what is missing
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        assert "manifest.json was changed after it was written" in inspect(checkpoint)
        (checkpoint / "manifest.json").write_text("{")
        assert "whose manifest can't be read" in inspect(checkpoint)
        (checkpoint / "manifest.json").unlink()
        assert "a checkpoint without a manifest" in inspect(checkpoint)

    def test_a_run(self, checkpoint, model, inspect):
        run = checkpoint.parent
        (run / "config.yaml").write_text("seed: 0\n")
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5}\n{"step": 4, "loss": 2.25}\n{"st')
        said = inspect(run)
        assert "is a training run, not finished." in said
        assert "Last step logged 4, loss 2.25" in said
        assert "# resumes from checkpoint-4" in said
        save(model, run / "projector")
        (run / "report").mkdir()
        (run / "report" / "results.json").write_text(json.dumps({**RESULTS, "trainable_parameters": 18_624}))
        said = inspect(run)
        assert "is a training run, finished." in said
        assert "fine-tuned 93.4 % at 8 of 16 tokens" in said
        assert "Trained 18.6 k parameters" in said


def test_a_token_cache(model, tmp_path, inspect):
    folder = tmp_path / "cache"
    data = DataConfig.model_validate({"sources": [{"path": str(tmp_path / "x.json")}]})
    claim(folder, identity(model, tiny_processor(), BUDGET, data, "bfloat16"))
    assert "it has no shards yet" in inspect(folder)
    writer = TokenWriter(folder)
    writer.add((1, 2), {}, {"tokens": torch.ones(8, 32)})
    writer.close()
    said = inspect(folder)
    assert "is a cache of compressed visual tokens, to train from without the vision tower." in said
    assert "Budget 8 visual tokens (5 dominant + 3 contextual)" in said
    assert "Stored as bfloat16" in said
    assert "Shards 1 (" in said
    (folder / ".index.lock").touch()  # of whoever reads it
    assert "Being written" not in inspect(folder)
    (folder / ".1.tokens.host-1.part").touch()
    assert "Being written 1 (or left by a writer that was killed)" in inspect(folder)
    (folder / "cache.json").write_text("[]")
    assert "whose cache.json can't be read" in inspect(folder)


def test_loose_files(tmp_path, inspect):
    torch.save({"a": torch.ones(3, 4)}, tmp_path / "x.pt")
    assert "a dict of tensors that torch.save wrote. Parameters 12 in 1 tensors, float32 Tensors a [3, 4]" in inspect(
        tmp_path / "x.pt"
    )
    torch.save({"a": print}, tmp_path / "y.pt")
    said = inspect(tmp_path / "y.pt")
    assert "a pickle that was not opened" in said
    assert "could run code when read (print); nothing was run" in said
    from safetensors.torch import save_file

    save_file({"b": torch.ones(5), "s": torch.tensor(1.0)}, tmp_path / "z.safetensors")
    said = inspect(tmp_path / "z.safetensors")
    assert "a safetensors file, but not a projector of this toolkit" in said
    assert "Parameters 6 in 2 tensors, float32 Tensors b [5], s []" in said
    torch.save({"a": torch.ones(3, 4)}, tmp_path / "pytorch_model.bin")
    assert "a dict of tensors that torch.save wrote" in inspect(tmp_path / "pytorch_model.bin")
    torch.save({"a": torch.ones(3, 4)}, tmp_path / "mm_projector.bin")
    assert "meant to be a projector for LLaVA's own loader" in inspect(tmp_path / "mm_projector.bin")


def test_what_it_does_not_know(tmp_path, inspect):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    assert "a file of a kind this toolkit does not know. Size" in inspect(tmp_path / "a.png")
    assert "a directory of a kind this toolkit does not know. Contains a.png" in inspect(tmp_path)
    shutil.rmtree(tmp_path)
    assert "visionzip inspect: there is nothing at" in inspect(tmp_path, code=2)


def test_as_json(model, tmp_path, capsys):
    save(model, tmp_path / "out")
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["what"] == "a projector fine-tuned with visionzip-ft"
    assert found["facts"]["Budget"] == "8 visual tokens (5 dominant + 3 contextual)"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (13_200_000, "13.2 MB"), (14e9, "14 GB"), (2e15, "2e+03 TB")]
)
def test_sizes(count, text):
    assert format_size(count) == text
