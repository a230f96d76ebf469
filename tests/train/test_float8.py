"""`model.frozen_dtype: float8`: the products against a plain quantiser, and a run whose projector belongs to the unquantised model."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families.case import Case, cases
from tests.train.test_gradient import program
from tests.train.workspace import ROOT, config_of
from train.build import build_model
from train.config import ConfigError, parse_config
from train.float8 import FrozenFloat8Linear, freeze_in_float8
from visionzip.families import family_for
from visionzip.fingerprint import fingerprint

INSTALLED = (
    ROOT / ".venv" / "torchao"
)  # `make setup` puts it there: in the environment itself, transformers would import it everywhere


@pytest.fixture(autouse=True)
def _torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    assert INSTALLED.is_dir(), f"{INSTALLED} is missing; run make setup"
    monkeypatch.setattr(sys, "path", [*sys.path, str(INSTALLED)])


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To float8 and back: the largest magnitude becomes the largest power-of-two multiple of itself that the type holds."""
    most = values.abs().max().double()
    scale = 2 ** torch.floor(torch.log2(torch.finfo(dtype).max / most))
    return (values.double() * scale).float().to(dtype).double() / scale


def test_both_products_are_those_of_rounded_matrices() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 48)
    x = torch.randn(2, 5, 32, requires_grad=True)
    gradient = torch.randn(2, 5, 48)
    layer = FrozenFloat8Linear(linear)
    weight = rounded(linear.weight.detach(), torch.float8_e4m3fn)
    out = layer(x)
    expected = rounded(x.detach(), torch.float8_e4m3fn) @ weight.T + linear.bias.detach().double()
    assert (out - expected).abs().max() < 1e-5 < (out - linear(x)).abs().max()
    out.backward(gradient)
    assert x.grad is not None
    assert (x.grad - rounded(gradient, torch.float8_e5m2) @ weight).abs().max() < 1e-5


def test_stored_once_in_a_byte_per_weight_that_no_cast_touches() -> None:
    layer = FrozenFloat8Linear(nn.Linear(32, 48))
    before = layer.weight_bits.clone(), layer.scale_bits.clone()
    layer.bfloat16()
    assert torch.equal(layer.weight_bits, before[0])
    assert torch.equal(layer.scale_bits, before[1])
    assert layer.weight_bits.nbytes == 32 * 48
    assert list(layer.state_dict()) == ["bias"]
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("case", cases()[:3], ids=repr)
def test_the_llm_is_converted_and_nothing_else(case: Case) -> None:
    model = case.model()
    family = family_for(model)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    before = fingerprint(model, {"llm": family.llm})
    assert freeze_in_float8(model, family)
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert left < linear
    assert all(name.startswith(f"{family.llm}.") for name in linear - left)
    assert fingerprint(model, {"llm": family.llm}) == before


@pytest.mark.parametrize("changes", [{}, {"trainer__torch_compile": True, "model__attn_implementation": "eager"}])
def test_a_step_is_near_the_one_in_float32(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    found = []
    for frozen in (None, "float8"):
        _, trainer = program(
            workspace, tmp_path / str(frozen), monkeypatch, model__frozen_dtype=frozen, trainer__max_steps=1, **changes
        )
        trainer.train()
        found.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    plain, float8 = found
    assert plain != float8
    assert abs(float8 - plain) < 0.05 * plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__parts": ["llm"]}, "the LLM would be trained"),
        ({"train__lora": {"on": ["llm"], "r": 2}}, "the LLM would be trained"),
        ({"model__quantization": "4bit"}, "can't be combined"),
        ({"trainer__deepspeed": "zero3"}, "ZeRO-3 can't shard these weights"),
        ({"model__frozen_dtype": "float4"}, "frozen_dtype"),
    ],
)
def test_what_it_does_not_go_with(workspace: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(config_of(workspace, tmp_path, **{"model__frozen_dtype": "float8", **changes}))


def test_without_torchao(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'visionzip-ft\[float8\]'"):
        build_model(parse_config(config_of(workspace, tmp_path, model__frozen_dtype="float8")))


def test_a_gpu_that_is_too_old(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(config_of(workspace, tmp_path, model__frozen_dtype="float8"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 or more.*has 8\.6"):
        build_model(config)
