"""On the embedded model: what was exported answers held-out questions exactly as what was trained."""

import copy
from pathlib import Path

import pytest
import torch

from data import shapes
from visionzip import ZipConfig, attached, load, save

MODEL = Path(__file__).parents[2] / "data" / "tiny-llava"
IMAGES = 6


@pytest.fixture(scope="module")
def trained():
    """The embedded model after a few steps of projector fine-tuning, and its processor."""
    model, processor = load(MODEL, "cpu", config=ZipConfig(dominant=13, contextual=3))
    model.requires_grad_(False)
    projector = model.get_submodule(attached(model).projector_names[0]).requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3)
    for _ in range(5):
        inputs = prompts(processor, "train", 4)
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, processor


def prompts(processor, split, images):
    texts, shown = [], []
    for record, image in shapes.records(split, images):
        for turn in record["conversations"][::2]:
            texts.append(f"USER: <image>\n{turn['value'].replace('<image>', '').strip()} ASSISTANT:")
            shown.append(image)
    return processor(text=texts, images=shown, padding=True, padding_side="left", return_tensors="pt")


def answers(model, processor):
    inputs = prompts(processor, "eval", IMAGES)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def rounded(model):
    """A copy with the projector as float16, which is what LLaVA makes of it, holds it."""
    copied = copy.deepcopy(model)
    for parameter in copied.get_submodule(attached(model).projector_names[0]).parameters():
        parameter.data = parameter.data.half().float()
    return copied


@pytest.mark.parametrize("name", ["safetensors", "llava", "merged", "peft"])
def test_exported_and_loaded_models_answer_as_the_trained_one(trained, tmp_path, name):
    model, processor = trained
    out = save(model, tmp_path / f"llava-{name}", name, **({"vision_tower": str(MODEL)} if name == "llava" else {}))
    given = answers(*load(out, "cpu"))
    assert len(given) == 5 * IMAGES
    assert len(set(given)) > 5
    assert given == answers(rounded(model) if name == "llava" else model, processor)
    untrained = answers(*load(MODEL, "cpu", config=attached(model).config))
    assert given != untrained  # it is the training that was kept
