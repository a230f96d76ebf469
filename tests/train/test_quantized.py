"""A quantised LLM: what of the model is quantised, and that the rest still trains. The kernels themselves need bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.trainer_utils import validate_quantization_for_training

from tests.families.case import Case, cases
from train import build
from train.build import build_model, not_quantized
from train.config import RunConfig, TrainSection, parse_config
from train.trainable import free_parameters
from visionzip.families import family_for


@pytest.mark.parametrize("case", cases(), ids=repr)
def test_the_llm_is_quantised_and_nothing_else(case: Case) -> None:
    """By the rule that transformers itself goes by."""
    with torch.device("meta"):
        model = case.model()
    family = family_for(model)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    quantised = {name for name in linear if should_convert_module(name, not_quantized(family))}
    assert quantised == {name for name in linear if name.startswith(f"{family.llm}.")}
    assert quantised
    assert quantised < linear


@pytest.mark.parametrize(
    "section",
    [{"parts": ["projector"]}, {"parts": ["projector"], "lora": {"on": ["llm"], "r": 2}}],
    ids=["projector", "lora"],
)
def test_beside_a_quantised_llm_the_trainer_lets_train(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any]
) -> None:
    """`is_quantized` is what transformers calls a model that it loaded with bitsandbytes; the weights here are whole ones."""
    monkeypatch.setattr(build, "quantization_options", lambda asked: {})
    model, _ = build_model(quantised_run(workspace, tmp_path))
    model.is_quantized, model.hf_quantizer = True, Trainable()
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    assert free_parameters(model, TrainSection.model_validate(section))
    validate_quantization_for_training(model)


class Trainable:
    """Of a quantizer what the Trainer asks."""

    is_trainable = True


def quantised_run(workspace: Path, output: Path) -> RunConfig:
    plain = {
        "output_dir": str(output),
        "model": {"path": str(workspace / "model"), "dtype": "float32", "quantization": "4bit"},
        "zip": {"dominant": 5, "contextual": 2},
        "data": {"sources": [{"path": str(workspace / "train.json")}]},
    }
    return parse_config(plain)
