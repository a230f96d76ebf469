"""The memory table: arithmetic on the shapes of real models, without a weight of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.workspace import ROOT, config_of
from train.commands import start
from train.config import load_config, parse_config
from train.duration import sample_work
from train.memory import (
    GIB,
    activation_bytes,
    estimate_memory,
    list_plans,
    measure_model,
    model_without_weights,
    render_plans,
)
from train.trainable import count_parameters, free_parameters

SEVEN = ROOT / "configs" / "llava-1.5-7b"


def test_llava_7b_is_counted_from_its_config() -> None:
    config = load_config(SEVEN / "ft-64.yaml")
    sizes = measure_model(model_without_weights(config, SEVEN), config)
    assert sizes.trained == 20_979_712 == config.train.expect_parameters
    assert round(sizes.total / 1e9, 2) == 7.06
    assert sizes.visual == 64
    here = estimate_memory(list_plans(config)[0], sizes, 8, 364)
    assert here["weights"] == pytest.approx(2 * sizes.total)
    assert here["optimizer"] == pytest.approx(12 * sizes.trained / 8)
    assert 3 * 4 * sizes.trained < 300e6, "a checkpoint is under 300 MB"


def test_every_way_needs_no_more_than_the_one_before() -> None:
    config = load_config(SEVEN / "ft-64.yaml")
    sizes = measure_model(model_without_weights(config, SEVEN), config)
    ways = list_plans(config)
    totals = {way.name: sum(estimate_memory(way, sizes, 8, 364).values()) / GIB for way in ways}
    by_device = [totals[w.name] for w in ways if w.stage == 2 and not w.checkpointing and w.weight_bytes == 2]
    assert by_device == sorted(by_device, reverse=True)
    (offloaded,) = (total for name, total in totals.items() if "zero3_offload" in name)
    assert offloaded < 4
    assert totals["as configured"] > 24 > totals["trainer.per_device_train_batch_size=4"]


def test_trained_parameters_are_those_that_would_train(workspace: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    for train in ({}, {"parts": ["projector", "llm"]}, {"parts": [], "lora": {"on": ["projector", "llm"], "r": 3}}):
        config = parse_config(config_of(workspace, tmp_path, train=train))
        planned = measure_model(model_without_weights(config, tmp_path), config)
        model = AutoModelForImageTextToText.from_pretrained(workspace / "model")
        total = sum(p.numel() for p in model.parameters())
        free_parameters(model, config.train)
        assert (planned.trained, planned.total) == (count_parameters(model), total)


def test_activations_against_what_autograd_keeps(workspace: Path, tmp_path: Path) -> None:
    """One frozen layer of LLaVA-7B's shape on tensors without memory: the bytes autograd saves for a token."""
    config = load_config(SEVEN / "ft-64.yaml")
    model = model_without_weights(config, SEVEN).to(torch.bfloat16)
    sizes = measure_model(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    llm = model.model.language_model
    length, kept = 256, {}
    hidden = torch.empty(1, length, sizes.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    positions = llm.rotary_emb(hidden, torch.arange(length, device="meta")[None])
    frozen = {p.untyped_storage()._cdata for p in llm.parameters()} | {hidden.untyped_storage()._cdata}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        llm.layers[0](hidden, position_embeddings=positions, attention_mask=None)
    maps = {
        cdata for cdata, (_, t) in kept.items() if t.shape[-2:] == (length, length)
    }  # only the plain kernel keeps these
    measured = sum(size for cdata, (size, _) in kept.items() if cdata not in frozen | maps)
    assert activation_bytes(sizes) == pytest.approx(measured / length, rel=0.25)


def test_what_it_advises_is_a_config_that_is_accepted() -> None:
    """Every row can be pasted behind the command as it stands; a quantised LLM is not advised where the LLM trains."""
    for overrides in ([], ["train.parts=[projector,llm]", "train.expect_parameters=null"], ["model.quantization=4bit"],
                      ["trainer.deepspeed=zero3_offload"], ["trainer.deepspeed=zero2_offload"]):  # fmt: skip
        for way in list_plans(load_config(SEVEN / "ft-64.yaml", overrides))[1:]:
            changed = load_config(SEVEN / "ft-64.yaml", [*overrides, *way.name.split()])
            assert replace(list_plans(changed)[0], name=way.name) == way


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert start("plan", ["--config", str(SEVEN / "ft-64.yaml"), "--gpus", "8", "--gpu-memory", "24"]) == 0
    said = capsys.readouterr().out
    assert "252 MB" in said
    assert "the least change that does: trainer.per_device_train_batch_size=2" in said
    assert start("plan", ["--config", str(SEVEN / "ft-64.yaml"), "--gpu-memory", "80"]) == 0
    assert "It fits as it is." in capsys.readouterr().out
    assert start("plan", ["--config", str(SEVEN / "ft-64.yaml"), "--gpu-memory", "1"]) == 0
    assert "Nothing here fits" in capsys.readouterr().out
    assert start("plan", ["--config", str(ROOT / "configs/tiny-llava/demo.yaml"), f"model.path={tmp_path}/none"]) == 2
    assert "model.path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--gpus", "0"], ["--gpus", "two"], ["--gpu-memory", "-1"], ["--gpu-memory", "nan"], ["--length", "0"]]
)
def test_what_is_no_number_of_gpus_or_gib_is_said_in_a_line(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        start("plan", ["--config", str(SEVEN / "ft-64.yaml"), *wrong])
    assert ended.value.code == 2
    assert f"argument {wrong[0]}: must be" in capsys.readouterr().err.splitlines()[-1]


def test_a_way_fits_where_a_tenth_of_the_memory_is_left_free() -> None:
    config = load_config(SEVEN / "ft-64.yaml")
    sizes = measure_model(model_without_weights(config, SEVEN), config)
    (way, *_) = list_plans(config)
    total = sum(estimate_memory(way, sizes, 8, 364).values()) / GIB
    assert "It fits as it is." in render_plans([way], sizes, 8, total / 0.899, 364, False)
    assert "Nothing here fits" in render_plans([way], sizes, 8, total / 0.901, 364, False)


def test_the_work_of_a_sample_is_counted() -> None:
    """7B at 64 tokens: against products written out, and what each setting adds."""
    config = load_config(SEVEN / "ft-64.yaml")
    model = model_without_weights(config, SEVEN)
    sizes = measure_model(model, config)
    work = sample_work(model, config, sizes, 364)
    body = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert work.llm == 4 * body * 364 + 6 * 364**2 * 4096 * 32
    assert work.projector == 6 * 20_979_712 * 64
    assert work.encoder == pytest.approx(24 * (2 * 12_596_224 * 576 + 4 * 576**2 * 1024))
    for overrides, more in (("trainer.gradient_checkpointing=true", 1.49), ("train.parts=[projector,llm]", 1.45)):
        changed = load_config(SEVEN / "ft-64.yaml", [overrides, "train.expect_parameters=null"])
        assert sample_work(model, changed, sizes, 364).llm > more * work.llm, overrides
    cached = load_config(SEVEN / "ft-64.yaml", ["data.cache=/tokens"])
    assert sample_work(model, cached, sizes, 364).encoder == 0


def test_time_follows_from_work_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--config", str(SEVEN / "ft-64.yaml"), "--gpus", "8", "--tflops", "400", "--samples", "66500"]
    assert start("plan", command) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    total, rate = float(said.split(" TFLOP per sample")[0]), float(said.split(" samples/s")[0].rsplit(" ", 1)[1])
    assert rate == pytest.approx(8 * 400 / total, rel=0.01)
    assert float(said.split(" hours")[0].rsplit(" ", 1)[1]) == pytest.approx(66_500 / rate / 3600, abs=0.01)
    demo = [
        "--config",
        str(ROOT / "configs/tiny-llava/demo.yaml"),
        f"model.path={ROOT / 'data/tiny-llava'}",
        "--tflops",
        "measure",
    ]
    assert start("plan", demo) == 0
    assert "44,800 samples take" in capsys.readouterr().out  # its max_steps times its global batch
