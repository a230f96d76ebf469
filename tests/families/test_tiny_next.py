"""How the embedded model's tiled sibling is made: its training sees exactly what transformers' LLaVA-NeXT sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data import shapes
from scripts import make_tiny_llava as make
from scripts import make_tiny_llava_next as make_next


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    make.make_model().save_pretrained(folder)
    make.make_processor(make.make_tokenizer(0)).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_features_and_newlines_are_those_of_the_model(base: Path) -> None:
    model, processor = make_next.make_model(base), make_next.make_processor(base)
    images = [shapes.draw_scene(shapes.make_scene(number)) for number in range(3)]
    inputs = processor(text=["<image> a"] * 3, images=images, return_tensors="pt", padding=True)
    assert inputs["pixel_values"].shape == (3, 3, 3, shapes.SIZE, shapes.SIZE)
    stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    pixels = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in images])
    features = make_next.features_of(model, processor, pixels.unflatten(1, (shapes.SIZE, shapes.SIZE, 3)))
    packing = make_next.WithNewlines(model.model.multi_modal_projector, model.model.image_newline, make_next.layout())
    torch.testing.assert_close(packing(features.float()), torch.stack(stock), rtol=1e-2, atol=1e-3)  # float16 features
    assert features.shape[1] == (inputs["input_ids"][0] == make.IMAGE).sum() == 180


def test_it_starts_from_the_weights_of_the_base(base: Path) -> None:
    model, donor = make_next.make_model(base), make.LlavaForConditionalGeneration.from_pretrained(base)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in donor.state_dict().items())
    assert state.keys() - donor.state_dict().keys() == {"model.image_newline"}
