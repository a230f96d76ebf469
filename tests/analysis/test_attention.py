"""Watched attention is the attention: against transformers' own maps, layer by layer, with CLS in its place."""

import pytest
import torch

from tests.families.case import cases
from tests.families.case import make_image as photo
from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached
from visionzip.analysis.attention import attention_by_layer, attention_map, watching
from visionzip.analysis.trace import image_inputs, to_model
from visionzip.app.looker import Looker

CASES = {case.name: case for case in cases()}


def maps_of(tower, pixels):
    """Every layer's attention, mean over heads, as transformers returns it with eager attention."""
    tower.config._attn_implementation = "eager"
    with torch.no_grad():
        return [layer.mean(dim=1) for layer in tower(pixels, output_attentions=True).attentions]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_layer_from_cls(attention):
    model, processor = tiny_llava(), tiny_processor()
    model.set_attn_implementation(attention)
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    inputs = image_inputs(processor, make_image(0))
    found = attention_by_layer(attached(model), inputs)
    expected = maps_of(model.model.vision_tower, inputs["pixel_values"])
    assert len(found) == len(expected) == 3
    for layer, whole in zip(found, expected, strict=True):
        shares = whole[:, 0, 1:] / whole[:, 0, 1:].sum(dim=1, keepdim=True)
        torch.testing.assert_close(layer, shares, rtol=1e-4, atol=1e-6)


def test_every_layer_received_where_there_is_no_cls():
    case = CASES["LLaVA-OneVision"]
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    inputs = image_inputs(processor, photo(0, (384, 384)))
    found = attention_by_layer(attached(model), inputs)
    expected = maps_of(model.model.vision_tower, to_model(model, inputs)["pixel_values"].flatten(0, 1))
    for layer, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(layer, whole.mean(dim=1), rtol=1e-4, atol=1e-6)


def test_windows_are_joined_by_their_size():
    case = CASES["Qwen2.5-VL"]
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    inputs = image_inputs(processor, photo(0, (300, 200)))
    patches = int(inputs["image_grid_thw"].prod())
    layers = attention_by_layer(attached(model), inputs)
    assert [tuple(layer.shape) for layer in layers] == [(1, patches)] * len(model.model.visual.blocks)
    for layer in layers:
        assert float(layer.sum()) == pytest.approx(1, abs=1e-5)


def test_the_map_of_the_layer_that_is_read():
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    inputs = image_inputs(processor, make_image(0))
    found = attention_map(attached(model), inputs)
    expected = maps_of(model.model.vision_tower, inputs["pixel_values"])[1]  # 3 layers, hidden_states[-2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("patch", [0, 6, 15])
def test_a_patch_is_not_mistaken_for_its_neighbour(patch):
    """Patch p is row p + 1 of the map, and the shares that are shown begin at column 1: CLS stands in front of both."""
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    looker = Looker(model, processor)
    from visionzip.analysis.trace import trace
    from visionzip.app.looker import Look

    look = Look(make_image(0), trace(model, make_image(0)))
    to, by = looker.attention_of(look, 0, patch)
    whole = maps_of(model.model.vision_tower, image_inputs(processor, make_image(0))["pixel_values"])[1][0]
    torch.testing.assert_close(torch.tensor(to.flatten()), whole[patch + 1, 1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(by.flatten()), whole[1:, patch + 1], rtol=1e-4, atol=1e-6)


def test_watching_leaves_the_model_as_it_was():
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    tower = model.model.vision_tower
    inputs = image_inputs(processor, make_image(0))
    before = attached(model).compress(**inputs)[0]
    seen = []
    with watching(tower, seen.append):
        inside = attached(model).compress(**inputs)[0]
    with pytest.raises(RuntimeError, match="stop"), watching(tower, seen.append):
        raise RuntimeError("stop")
    assert len(seen) == 2  # the layers that are run, and no other
    assert tower.config._attn_implementation == "sdpa"
    assert torch.equal(before, inside)
    assert torch.equal(before, attached(model).compress(**inputs)[0])


def test_no_encoder_of_transformers():
    with pytest.raises(ValueError, match="can't be captured"), watching(torch.nn.Linear(2, 2), print):
        pass
