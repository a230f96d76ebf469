"""vLLM gives what ``generate`` gives: prompts, visual embeddings, greedy answers. Run by `make test-serve`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.families.case import cases
from tests.serve.engine import STEP, Served, request
from tests.tiny import make_image

#: of the cases of tests/families, those that the engine takes; docs/serving.md says why others are refused
FAMILIES = ("LLaVA-1.5", "LLaVA with DINOv2", "LLaVA-NeXT")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[case for case in cases() if case.name in FAMILIES], ids=str)
def served(request: Any, tmp_path_factory: Any) -> Any:
    found = Served.of(request.param, tmp_path_factory.mktemp("model") / "merged"), request.param
    yield found
    gc.collect()


def questions(case: Any) -> list[tuple[str, list[Any]]]:
    """Prompts with one image each, some with text alone, one with two images."""
    sizes = [*case.sizes, (50, 40)]
    found = [(case.prompt(1), [make_image(seed, sizes[seed % len(sizes)])]) for seed in range(8)]
    found[2:2] = [("USER: what is this ASSISTANT:", []), ("USER: how many ASSISTANT:", [])]
    return [*found, (case.prompt(2), [make_image(20, sizes[0]), make_image(21, sizes[1])])]


def test_one_request_and_many_at_once_are_answered_as_by_generate(served):
    one, case = served
    asked = questions(case)
    expected = [one.generate(*each) for each in asked]
    together = one.ask([request(*each) for each in asked])
    for found, (prompt, answer) in zip(together, expected, strict=True):
        assert found.prompt_token_ids == prompt
        assert list(found.outputs[0].token_ids) == answer
    one.llm.reset_prefix_cache()
    [alone] = one.ask([request(*asked[0])])
    assert list(alone.outputs[0].token_ids) == expected[0][1]


def test_the_llm_reads_the_same_visual_embeddings(served):
    one, case = served
    pictures = [make_image(40, case.sizes[0]), make_image(41, case.sizes[1])]
    found = one.embeddings([request(case.prompt(1), [each]) for each in pictures])
    expected = [one.expected([each], case.prompt(1))[0] for each in pictures]
    assert len(found) == 2
    for theirs, ours in zip(found, expected, strict=True):
        assert theirs.shape == ours.shape
        assert (theirs - ours).abs().max() <= TOLERANCE


def test_images_of_one_step_are_encoded_in_one_batch(served):
    one, case = served
    family = one.served.family
    for number in (1, 8, 32):
        asked = [request(case.prompt(1), [make_image(100 * number + seed, case.sizes[0])]) for seed in range(number)]
        with counted(family) as calls:
            found = one.ask(asked, 1)
        steps = -(-sum(len(each.prompt_token_ids) for each in found) // STEP)
        assert len(calls) <= steps + 1, f"{len(calls)} calls of the encoder for {number} images in {steps} steps"


@contextmanager
def counted(family: Any) -> Iterator[list[int]]:
    """One entry for each call of the family's encoder."""
    calls: list[int] = []
    encode = type(family).encode

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return encode(family, *args, **kwargs)

    family.__dict__["encode"] = watched
    try:
        yield calls
    finally:
        del family.__dict__["encode"]


def test_a_second_turn_continues_from_the_cached_first(served):
    one, case = served
    first, image = case.prompt(1), make_image(60, case.sizes[0])
    one.ask([request(first, [image])])
    second = f"{first} a red circle USER: how many two yes no square blue red circle ASSISTANT:"
    [found] = one.ask([request(second, [image])])
    assert found.num_cached_tokens > 0
    prompt, answer = one.generate(second, [image])
    assert (found.prompt_token_ids, list(found.outputs[0].token_ids)) == (prompt, answer)


def test_another_budget_of_the_same_image_is_another_entry_of_every_cache(served):
    one, case = served
    prompt, image = case.prompt(1), make_image(80, case.sizes[0])
    small = {"mm_processor_kwargs": {"budget": "7+1"}}
    one.llm.reset_prefix_cache()
    fresh = [one.ask([request(prompt, [image])])[0], one.ask([request(prompt, [image], **small)])[0]]
    assert fresh[1].num_cached_tokens < len(fresh[1].prompt_token_ids) // 2
    assert len(fresh[0].prompt_token_ids) > len(fresh[1].prompt_token_ids)
    for _ in range(2):  # from the caches, in both orders
        for number, options in ((1, small), (0, {})):
            [again] = one.ask([request(prompt, [image], **options)])
            assert again.outputs[0].token_ids == fresh[number].outputs[0].token_ids
            assert again.prompt_token_ids == fresh[number].prompt_token_ids
    both = one.ask([request(prompt, [image]), request(prompt, [image], **small)])  # one batch, two budgets
    assert [each.outputs[0].token_ids for each in both] == [each.outputs[0].token_ids for each in fresh]


@pytest.mark.parametrize(
    "options", [{"budget": 400}, {"budget": "all"}, {"budget": [1]}, {"budget": 8, "size": {"height": 20000}}]
)
def test_a_budget_that_cannot_be_met_is_refused_and_the_next_request_is_answered(served, options):
    one, case = served
    with pytest.raises(ValueError, match="budget"):
        one.ask([request(case.prompt(1), [make_image(90, case.sizes[0])], mm_processor_kwargs=options)])
    assert one.ask([request(case.prompt(1), [make_image(90, case.sizes[0])])], 1)


def test_the_comparison_of_embeddings_would_see_the_first_patches_in_place_of_the_kept_ones(served):
    """What vLLM's own backend takes for a compressed processor's placeholders."""
    one, case = served
    image = make_image(41, case.sizes[0])
    inputs = one.processor(text=[case.prompt(1)], images=[image], return_tensors="pt")
    stock = type(one.model.model).get_image_features
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        features = stock(one.model.model, **images, return_dict=True).pooler_output[0]
    [kept] = one.expected([image], case.prompt(1))
    assert (features[: len(kept)] - kept).abs().max() > 100 * TOLERANCE
