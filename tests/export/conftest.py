"""A base model on disk and one that was trained from it."""

from pathlib import Path

import pytest
import torch

from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, load, save

BUDGET = ZipConfig(dominant=5, contextual=3)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path):
    """The directory of an untrained model."""
    directory = tmp_path / "base"
    tiny_llava().save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory


@pytest.fixture
def trained(base):
    """Attached; the projector is not the base's any more."""
    model, processor = tiny_llava(), tiny_processor()
    model.config._name_or_path = str(base)
    attach(model, processor, BUDGET)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.fixture
def adapted(trained):
    """Trained, with LoRA in the LLM beside the projector."""
    return add_lora(trained, ["q_proj", "v_proj"])


def add_lora(model, targets):
    from peft import LoraConfig

    names = [name for name, _ in model.named_modules() if "vision_tower" not in name and name.split(".")[-1] in targets]
    torch.manual_seed(8)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    return model


def answers(model, processor):
    """Logits for a prompt with two images, made by `processor`."""
    inputs = processor(
        text="USER: <image> what is <image> this",
        images=[make_image(1, (40, 40)), make_image(2, (40, 40))],
        return_tensors="pt",
    )
    assert inputs["input_ids"].shape[1] == 5 + 2 * 8
    with torch.no_grad():
        return model(**inputs.to(model.device)).logits.float()


@pytest.fixture(scope="session")
def torch_model():
    """The embedded tiny model with its processor, 13 + 3 tokens per image."""
    return load(ROOT / "data/tiny-llava", "cpu", "float32", config=ZipConfig(dominant=13, contextual=3))


@pytest.fixture(scope="session")
def exported(torch_model, tmp_path_factory):
    """The directory of its ONNX export, made once for all tests."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    return save(torch_model[0], tmp_path_factory.mktemp("device") / "onnx", "onnx", budgets="16,8")
