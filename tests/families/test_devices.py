"""On a device that is not the CPU, and on several: every family answers as it does on the CPU (see `tests.device`)."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from tests.device import DEVICE, OTHER, THIRD, Elsewhere, There, moved, there
from tests.families.case import Case, cases, video
from tests.families.test_properties import make_images, new_tokens
from visionzip import attach, attached
from visionzip.compress import compress
from visionzip.selectors import SELECTORS, Features

CASES = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


def ready(case: Case) -> tuple[Any, dict[str, dict[str, Any]]]:
    """An attached model, and inputs of two images and of a video where the family takes videos."""
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    prompts = [case.prompt(), case.prompt(question="a red circle")]
    given = {"image": case.process(processor, prompts, [make_images(case), make_images(case, 1, 1)])}
    if case.frames:
        given["video"] = case.process(processor, [case.prompt(0, 1)], videos=[video(0, case.frames)])
    return model, given


@pytest.mark.parametrize("merge", ["add", "mean", "none"])
@pytest.mark.parametrize("selector", SELECTORS.names())
def test_selection_never_waits_for_the_device(selector, merge):
    torch.manual_seed(0)
    given = [torch.randn(3, 26, 32), torch.randn(3, 26, 8), torch.rand(3, 26)]
    expected = compress(Features(*given, has_cls=True), 6, 3, selector=selector, merge=merge)
    with Elsewhere() as device:
        found = compress(Features(*there(given), has_cls=True), 6, 3, selector=selector, merge=merge)
    assert found.tokens.device == found.slots.device == DEVICE
    torch.testing.assert_close(found.tokens.held, expected.tokens)
    assert torch.equal(found.slots.held, expected.slots)
    assert device.waits == Counter()


@CASES
@torch.no_grad()
def test_on_a_device_as_on_the_cpu(case):
    """Same logits, same answer; and the host waits as often for two images as for one."""
    model, given = ready(case)
    expected = {kind: (model(**inputs).logits, new_tokens(model, inputs)) for kind, inputs in given.items()}
    one = case.process(attached(model).processor, [case.prompt()], [make_images(case)])
    with Elsewhere() as device:
        moved(model, DEVICE)
        for kind, inputs in given.items():
            inputs = there(inputs)
            torch.testing.assert_close(model(**inputs).logits.held, expected[kind][0], rtol=1e-4, atol=1e-4)
            assert torch.equal(new_tokens(model, inputs).held, expected[kind][1])
        waits = []
        for inputs in (one, given["image"]):
            device.waits.clear()
            attached(model).compress(**case.image_inputs(there(inputs)))
            waits.append(sum(device.waits.values()))
    assert waits[0] == waits[1]


@CASES
@torch.no_grad()
def test_under_a_device_map(case):
    """First layers of the encoder on one device, its others on a second, what comes behind on a third: as on the CPU."""
    model, given = ready(case)
    expected = {kind: (model(**inputs).logits, new_tokens(model, inputs)) for kind, inputs in given.items()}
    # PaliGemma's own mask wants the text where the LLM is, and generate puts it where the encoder is.
    own_mask = case.name == "PaliGemma"
    text = THIRD if own_mask else DEVICE
    with Elsewhere():
        moved(model, THIRD)
        family = attached(model).family
        for name in {family.tower, getattr(family, "video_tower", family.tower)}:
            tower = model.get_submodule(name)
            layers = next(part for part in tower.modules() if isinstance(part, nn.ModuleList))
            for child in tower.modules():
                if "embed" in type(child).__name__.lower():
                    moved(child, DEVICE)
            for number, layer in enumerate(layers):
                moved(layer, DEVICE if number < len(layers) // 2 else OTHER)
        follow(model)
        for kind, inputs in given.items():
            media = case.image_inputs(inputs)
            inputs = {name: there(value, DEVICE if name in media else text) for name, value in inputs.items()}
            torch.testing.assert_close(model(**inputs).logits.held, expected[kind][0], rtol=1e-4, atol=1e-4)
            assert own_mask or torch.equal(new_tokens(model, inputs).held, expected[kind][1])


def follow(model: nn.Module) -> None:
    """What a module is given goes to where it is, as accelerate's hooks see to: for modules that lie on one device."""
    for module in model.modules():
        places = {value.device for value in chain(module.parameters(), module.buffers())}
        if len(places) == 1:
            place = places.pop()

            def follows(module: Any, args: Any, kwargs: Any, place: Any = place) -> Any:
                return tree_map(lambda x: x.to(place) if isinstance(x, There) else x, (args, kwargs))

            module.register_forward_pre_hook(follows, with_kwargs=True)


@CASES
@torch.no_grad()
def test_pixels_of_another_precision_than_the_encoder(case):
    """A processor gives float32 whatever the model was loaded in, and the untouched models take it."""
    model, given = ready(case)
    model.double()
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given["image"].items()}
    torch.testing.assert_close(model(**given["image"]).logits, model(**wide).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prompts_of_a_stock_processor_are_shortened_on_the_device():
    case = next(case for case in cases() if case.name == "LLaVA-1.5")
    model = attach(case.model(), None, case.budget)
    prompts = [case.prompt(), case.prompt(question="a red circle")]
    inputs = case.process(case.processor(), prompts, [make_images(case), make_images(case, 1, 1)])
    expected = new_tokens(model, inputs)
    with Elsewhere():
        moved(model, DEVICE)
        assert torch.equal(new_tokens(model, there(inputs)).held, expected)
