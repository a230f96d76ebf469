"""Another budget without attaching again, and several in one batch: the same as a model attached at that budget, for every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.families.case import Case, cases, make_image
from visionzip import ZipConfig, attach, attached, detach, set_budget
from visionzip.inputs import batch_prompts, process_images, text_inputs

CASES = cases()
MIXED = [case for case in CASES if case.name not in ("Idefics3", "SmolVLM")]
LLAVA = next(case for case in CASES if case.name == "LLaVA-1.5")
PLACED = copy.copy(LLAVA)
PLACED.name, PLACED.budget = "LLaVA-1.5, original positions", LLAVA.budget.model_copy(update={"positions": "original"})


def named(case: Case) -> str:
    return case.name


def row(case: Case, processor: Any, images: list[Any], budgets: list[Any] | None = None) -> dict[str, Any]:
    """One prompt's inputs, as `visionzip.inputs.prompt_inputs` makes them."""
    shown = process_images(processor, images, budgets)
    text = case.prompt(len(images)).replace(processor.image_token, "\0")
    for placeholders in shown.placeholders:
        text = text.replace("\0", placeholders, 1)
    ids = processor.tokenizer(text)["input_ids"]
    return {**text_inputs(processor, ids), **shown.inputs}


@pytest.mark.parametrize("case", [*CASES, PLACED], ids=named)
@torch.no_grad()
def test_another_budget_is_a_fresh_attachment_bit_for_bit(case: Case) -> None:
    model, processor = case.model(), case.processor()
    images = [[make_image(0, case.sizes[0])]]
    untouched = case.process(case.processor(), [case.prompt()], images)
    whole = model(**untouched).logits
    attach(model, processor, case.budget)
    first = attached(model)
    for budget in (9, (20, 3), "all", 0.1, "9+2"):
        set_budget(model, budget)
        inputs = case.process(processor, [case.prompt()], images)
        found = model(**inputs).logits
        if budget == "all":
            assert torch.equal(found, whole)
            continue
        other, its = case.model(), case.processor()
        config = attached(model).config
        attach(other, its, ZipConfig(**config.model_dump()))
        expected = case.process(its, [case.prompt()], images)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
        assert torch.equal(found, other(**expected).logits), budget
        assert model.config.visionzip == config.model_dump()
        if budget in (9, (20, 3)):
            assert attached(model) is first, "nothing is attached again"
    detach(model)
    assert torch.equal(model(**case.process(processor, [case.prompt()], images)).logits, whole)


@pytest.mark.parametrize("case", [*MIXED, PLACED], ids=named)
@torch.no_grad()
def test_images_with_their_own_budgets_are_what_they_are_alone(case: Case) -> None:
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    images = [make_image(index, case.sizes[index % len(case.sizes)]) for index in range(3)]
    rows = [
        row(case, processor, images[:1], [9]),
        row(case, processor, images[1:2], [(20, 3)]),
        row(case, processor, images[2:], [None]),
    ]
    batch = attached(model).encode(batch_prompts(processor, rows))
    assert "pixel_values" not in batch
    together = model.generate(
        **batch, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new = together.sequences[:, batch["input_ids"].shape[1] :]
    for index, budget in enumerate([9, (20, 3), (case.budget.dominant, case.budget.contextual)]):
        set_budget(model, budget)
        alone = batch_prompts(processor, [row(case, processor, [images[index]])])
        width = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][index, -width:], alone["input_ids"][0])
        expected = model.generate(**alone, max_new_tokens=3, do_sample=False)[0, width:]
        assert torch.equal(new[index], expected), budget
        logits = model.generate(**alone, max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0][
            0
        ]
        torch.testing.assert_close(together.logits[0][index], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [*MIXED, PLACED], ids=named)
@torch.no_grad()
def test_two_images_of_one_prompt_with_two_budgets(case: Case) -> None:
    """Each keeps the tokens that it has in a prompt of two at its own budget."""
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    if attached(model).family.by_tile:
        pytest.skip("an image is several entries; the batch of three prompts shows the same")
    images = [make_image(index, case.sizes[index % len(case.sizes)]) for index in range(2)]
    both = batch_prompts(processor, [row(case, processor, images, [9, (20, 3)])])
    found = attached(model).compress(
        both["image_budgets"], **case.image_inputs(attached(model).family.image_inputs(both))
    )
    for place, budget in enumerate((9, (20, 3))):
        set_budget(model, budget)
        inputs = batch_prompts(processor, [row(case, processor, images)])
        expected = attached(model).compress(**case.image_inputs(inputs))[place]
        for one, other in zip(flat(found[place]), flat(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def flat(tokens: Any) -> list[torch.Tensor]:
    return [tokens] if isinstance(tokens, torch.Tensor) else [tokens[name] for name in sorted(tokens)]
