"""Images reach the model whole: padded as in training by whoever prepares them, and by the processor of an attached model."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig
from data.images import PixelImages
from data.sample import Media, Sample
from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, detach
from visionzip.images import pad_to_square, padding_colour, prepare_image

BUDGET = ZipConfig(dominant=5, contextual=3)


def llava_pads(image, mean):
    """What LLaVA's evaluation does to an image (`image_aspect_ratio: pad`), in numpy."""
    pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(value * 255) for value in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return Image.fromarray(square)


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (31, 10), (20, 20)])
def test_the_processor_of_an_attached_model_pads_as_llava_does(size, tmp_path):
    image = make_image(0, size)
    stock, processor = tiny_processor(), tiny_processor()
    expected = stock.image_processor(llava_pads(image, stock.image_processor.image_mean), return_tensors="pt")
    attach(tiny_llava(), processor, BUDGET)
    text = "USER: <image> what ASSISTANT:"
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    # the dataset, which prepares images itself, gives the same
    image.save(tmp_path / "a.png")
    data = PixelImages(DataConfig.model_validate({"sources": [{"path": "x.json"}]}), stock)
    item = data(Sample("a", [], [Media("image", str(tmp_path / "a.png"))]))
    assert torch.equal(item.inputs["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("form", ["array", "tensor", "batch", "list", "transparent"])
def test_whatever_form_an_image_comes_in(form):
    image = make_image(0, (30, 10))
    pixels = np.array(image)
    given = {
        "array": pixels,
        "tensor": torch.from_numpy(pixels).movedim(-1, 0),
        "batch": np.stack([pixels]),
        "list": [[image]],
        "transparent": image.convert("RGBA"),
    }[form]
    processor = tiny_processor()
    expected = processor.image_processor(llava_pads(image, processor.image_processor.image_mean), return_tensors="pt")
    attach(tiny_llava(), processor, BUDGET)
    found = processor(images=given, text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected["pixel_values"])


def test_detached_and_switched_off():
    image, text = make_image(0, (30, 10)), "<image>"
    stock = tiny_processor()(images=image, text=text, return_tensors="pt")["pixel_values"]
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, ZipConfig(dominant=5, contextual=3, pad_images=False))
    assert torch.equal(processor(images=image, text=text, return_tensors="pt")["pixel_values"], stock)
    attach(model, processor, BUDGET)
    assert not torch.equal(processor(images=image, text=text, return_tensors="pt")["pixel_values"], stock)
    detach(model)
    assert torch.equal(processor(images=image, text=text, return_tensors="pt")["pixel_values"], stock)


@pytest.mark.parametrize(("pad_images", "size"), [("auto", (30, 10)), (True, (30, 30)), (False, (30, 10))])
def test_a_processor_that_does_not_crop(pad_images, size):
    processor = tiny_processor()
    processor.image_processor.do_center_crop = False
    assert prepare_image(make_image(0, (30, 10)), processor, pad_images).size == size


def test_the_colour_is_the_processors_mean():
    processor = tiny_processor()
    assert padding_colour(processor) == (122, 116, 104)
    processor.image_processor.image_mean = None
    assert padding_colour(processor) == (0, 0, 0)


def test_pad_to_square():
    padded = pad_to_square(Image.new("RGB", (30, 10), "white"), (1, 2, 3))
    assert padded.size == (30, 30)
    assert [padded.getpixel((15, y)) for y in (0, 9, 10, 19, 20)] == [(1, 2, 3)] * 2 + [(255,) * 3] * 2 + [(1, 2, 3)]
    assert pad_to_square(padded, (0, 0, 0)) is padded
