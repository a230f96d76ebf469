"""Compiled norms and MLPs change nothing, and are compiled once, whatever the lengths."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.families.case import Case, cases
from tests.train.test_loss import batch, beginning, check, model  # noqa: F401
from train.arguments import TrainerSection, check_compile, training_arguments
from train.compiled import compile_parts, compiled_parts, uncompile_parts
from train.layout import PackedRow, PaddedRows
from visionzip import attach, attached


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_equal_for_every_length_and_compiled_once(model, fresh_compiler):  # noqa: F811
    llm = model.model.language_model
    seen: list[int] = []
    compile_parts(llm, backend="aot_eager")
    prefix = beginning(model)
    for rows in (3, 2, 4):
        inputs, labels = batch(rows, seed=rows)
        check(
            model, inputs, labels, layout=PackedRow(llm)
        )  # its plain forward is compiled too: see the next test for one that is not
        check(model, inputs, labels, layout=PackedRow(llm, prefix))
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[0] == seen[-1], "compiled anew for another length"
    assert (
        seen[0] <= 6
    )  # norm and MLP, for several rows, for one, and for one without gradients (the prefix); layers share them
    assert not counters["recompile_limit"]


def test_loss_and_gradient_are_those_of_the_model_as_it_was(model, fresh_compiler):  # noqa: F811
    from train.loss import summed_loss

    def found() -> tuple[float, torch.Tensor]:
        inputs, labels = batch()
        loss = summed_loss(model, model.lm_head, inputs, labels, PackedRow(model.model.language_model))
        gradients = torch.autograd.grad(loss, list(model.model.multi_modal_projector.parameters()))
        return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])

    before = found()
    compile_parts(model.model.language_model, backend="aot_eager")
    compiled = found()
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert compiled[0] == pytest.approx(before[0], rel=1e-5)
    assert (compiled[1] - before[1]).norm() / before[1].norm() < 1e-5
    graphs = counters["stats"]["unique_graphs"]
    uncompile_parts(model.model.language_model)
    assert found()[0] == before[0]
    assert counters["stats"]["unique_graphs"] == graphs


def test_under_eager_attention_whole_layers_once_for_every_length(model, fresh_compiler):  # noqa: F811
    from train.loss import summed_loss

    llm: Any = model.model.language_model
    llm.set_attn_implementation("eager")
    projector = list(model.model.multi_modal_projector.parameters())

    def found(rows: int) -> tuple[float, torch.Tensor]:
        inputs, labels = batch(rows, seed=rows)
        loss = summed_loss(model, model.lm_head, inputs, labels, PaddedRows(masked=False))
        return loss.item(), torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, projector)])

    before = {rows: found(rows) for rows in (3, 2, 4)}
    assert compiled_parts(llm) == list(llm.layers)
    compile_parts(llm, backend="aot_eager")
    graphs = []
    for rows, (loss, gradient) in before.items():
        compiled = found(rows)
        graphs.append(counters["stats"]["unique_graphs"])
        assert compiled[0] == pytest.approx(loss, rel=1e-5)
        assert (compiled[1] - gradient).norm() / gradient.norm() < 1e-5
    assert graphs[0] == graphs[-1] == 1
    uncompile_parts(llm)
    assert found(3)[0] == before[3][0]


def test_answers_between_steps_do_not_use_up_the_compiler(model, fresh_compiler):  # noqa: F811
    """A KV cache differs from layer to layer: eight layers would reach torch's limit, and training would run uncompiled."""
    from train.loss import summed_loss

    llm: Any = model.model.language_model
    llm.set_attn_implementation("eager")
    inputs, labels = batch(2)
    asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 3}
    asked |= {key: value for key, value in inputs.items() if key.startswith("pixel")}
    before = model.generate(**asked, do_sample=False)
    compile_parts(llm, backend="aot_eager")
    assert torch.equal(model.generate(**asked, do_sample=False), before)
    assert counters["stats"]["unique_graphs"] == 0
    summed_loss(model, model.lm_head, inputs, labels, PaddedRows(masked=False))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_of_every_family_all_but_attention(case: Case) -> None:
    model = attach(case.model("sdpa"), case.processor(), case.budget)  # noqa: F811
    llm: Any = model.get_submodule(attached(model).family.llm)  # type: ignore[union-attr]
    inside = {id(module) for part in compiled_parts(llm) for module in part.modules()}
    attention = {id(module) for layer in llm.layers for module in layer.self_attn.modules()}
    rest = {id(module) for layer in llm.layers for module in layer.modules()} - attention - {id(x) for x in llm.layers}
    assert inside == rest


def test_the_trainer_is_not_asked_to_compile_the_model_as_well(tmp_path) -> None:
    section = TrainerSection(deepspeed="off", torch_compile=True, torch_compile_backend="aot_eager")
    args = training_arguments(section, output_dir=str(tmp_path), seed=0, dtype="float32", world_size=1)
    assert not args.torch_compile


def test_not_under_zero3_and_not_by_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="torch_compile: ZeRO-3 gathers weights"):
        check_compile(TrainerSection(torch_compile=True), {"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match=r"'inductr' is none of .*inductor"):
        check_compile(TrainerSection(torch_compile=True, torch_compile_backend="inductr"), None)
    check_compile(TrainerSection(torch_compile=True), {"zero_optimization": {"stage": 2}})
    check_compile(TrainerSection(), {"zero_optimization": {"stage": 3}})


def test_what_is_in_force_is_said() -> None:
    prefix: Any = SimpleNamespace(beginning=[0] * 36)
    assert PaddedRows().describe() == ["padded batches"]
    assert PackedRow(torch.nn.Identity(), prefix).describe() == [
        "samples packed into rows without padding",
        "the first 36 tokens computed once",
    ]
