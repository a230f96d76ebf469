"""What trains is what was named, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tiny import tiny_llava, tiny_processor
from tests.train.test_resume import far, saving
from tests.train.workspace import Ranks, config_of, equal, losses, projector
from train.build import build_model, master_precision, quantization_options
from train.config import ConfigError, LoraSection, ModelSection, TrainSection, parse_config
from train.trainable import check_trainable, count_parameters, free_parameters, linear_layers

PROJECTOR = 32 * 48 + 48 + 48 * 48 + 48


def section(**changes: Any) -> TrainSection:
    return TrainSection.model_validate(changes)


@pytest.mark.parametrize(
    ("parts", "starts"),
    [
        (["projector"], ("model.multi_modal_projector.",)),
        (["llm"], ("model.language_model.", "lm_head.")),
        (["projector", "llm"], ("model.multi_modal_projector.", "model.language_model.", "lm_head.")),
    ],
)
def test_parts(model: nn.Module, parts: list[str], starts: tuple[str, ...]) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    names = free_parameters(model, section(parts=parts))
    expected = [name for name, _ in model.named_parameters() if name.startswith(starts)]
    assert names == expected
    assert [name for name, p in model.named_parameters() if p.requires_grad] == expected
    if parts == ["projector"]:
        assert count_parameters(model) == PROJECTOR


def test_a_head_tied_to_the_embedding() -> None:
    model = tiny_llava()
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    names = free_parameters(model, section(parts=["llm"]))
    assert all(name.startswith("model.language_model.") for name in names)
    assert model.lm_head.weight.requires_grad


def test_lora_on_both(model: nn.Module) -> None:
    lora = LoraSection(on=["projector", "llm"], r=2, alpha=4, targets=["q_proj", "linear_1"])
    names = free_parameters(model, section(parts=[], lora=lora.model_dump()))
    assert names
    assert all("lora_" in name for name in names)
    assert {name.split(".lora_")[0] for name in names} == {
        "model.multi_modal_projector.linear_1",
        *(f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)),
    }
    assert count_parameters(model) == 2 * (32 + 48) + 2 * 2 * (48 + 48)


def test_lora_beside_a_projector_trained_in_full(model: nn.Module) -> None:
    names = free_parameters(model, section(parts=["projector"], lora={"on": ["llm"], "r": 2}))
    assert sum("lora_" not in name for name in names) == 4
    assert not any("vision_tower" in name or "lm_head" in name for name in names)
    with pytest.raises(ValueError, match="no linear layer called"):
        linear_layers(model, LoraSection(on=["llm"], targets=["nothing"]))


def test_the_count_is_checked(model: nn.Module) -> None:
    free_parameters(model, section(expect_parameters=PROJECTOR))
    with pytest.raises(ValueError, match=rf"{PROJECTOR:,} parameters would train"):
        free_parameters(model, section(expect_parameters=PROJECTOR + 1))
    allowed = {name for name, p in model.named_parameters() if p.requires_grad}
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"1 parameters too many \['lm_head.weight'\]"):
        check_trainable(model, allowed)


def test_masters_are_float32(model: nn.Module) -> None:
    model.bfloat16()
    free_parameters(model, section())
    master_precision(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_quantisation_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        quantization_options(ModelSection(path="m", quantization="4bit"))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    config = parse_config({"output_dir": "x", "model": {"path": str(tmp_path)}, "data": {"sources": [{"path": "d"}]}})
    with pytest.raises(ConfigError, match=r"model\.path"):
        build_model(config)


@pytest.mark.parametrize("cached", [False, True])
def test_a_base_with_a_weight_that_is_missing_is_refused(tmp_path: Path, cached: bool) -> None:
    """transformers draws it at random, and a run went on with it."""
    tiny_llava().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    lost = next(name for name in state if name.endswith("layers.0.self_attn.k_proj.weight") and "language" in name)
    save_file({name: value for name, value in state.items() if name != lost}, file, metadata={"format": "pt"})
    content: dict[str, Any] = {
        "output_dir": "x",
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "zip": {"dominant": 5, "contextual": 2},
        "data": {"sources": [{"path": "d"}], "cache": str(tmp_path / "cache") if cached else None},
    }
    with pytest.raises(ConfigError, match=r"model\.path: .* 1 weight missing \(.*k_proj.*\)$"):
        build_model(parse_config(content))


@pytest.mark.launch
def test_lora_trains_resumes_and_loads_with_peft(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Projector in full and LoRA on the LLM: exact resume under ZeRO-2 and 3, and an adapter that PEFT itself loads."""
    lora = {"train__lora": {"on": ["llm"], "r": 2, "dropout": 0.1}}
    whole = saving(workspace, tmp_path / "zero2", "zero2", **lora)
    again = saving(workspace, tmp_path / "again", "zero2", trainer__resume=f"{tmp_path}/zero2/checkpoint-2", **lora)
    no_dropout = {"train__lora": {"on": ["llm"], "r": 2}}
    two = saving(workspace, tmp_path / "two", "zero2", **no_dropout)
    three = saving(workspace, tmp_path / "three", "zero3", **no_dropout)
    ranks.run(whole, again, two, three)
    assert equal(projector(tmp_path / "zero2"), projector(tmp_path / "again"))
    assert losses(tmp_path / "again") == losses(tmp_path / "zero2")[2:], "dropout's random numbers are restored too"
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    assert far(projector(tmp_path / "two"), projector(tmp_path / "three")) < 1e-3

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(workspace / "model")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "zero2" / "adapter"))
    trained = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert trained
    assert all(float(p.abs().max()) > 0 for p in trained)


@pytest.mark.launch
def test_from_scratch_in_two_stages(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Table 11 of the paper: captions train the projector, then instructions train projector and LLM."""
    rows = [row for row in json.loads((workspace / "train.json").read_text()) if "image" in row]
    captions = [{**row, "conversations": row["conversations"][:2]} for row in rows]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    source = [{"path": str(tmp_path / "captions.json"), "images": str(workspace / "images")}]
    one = config_of(workspace, tmp_path / "one", data__template="plain", data__sources=source)
    two = config_of(
        workspace,
        tmp_path / "two",
        train__parts=["projector", "llm"],
        model__projector=str(tmp_path / "one" / "projector"),
        trainer__deepspeed="zero3",
    )
    two["model"]["path"] = str(workspace / "model")
    ranks.run(one, two)
    assert losses(tmp_path / "two")[-1] < losses(tmp_path / "two")[0]
    assert not equal(projector(tmp_path / "one"), projector(tmp_path / "two"))
    assert (tmp_path / "two" / "model" / "config.json").is_file()
