"""Pictures reach the model whole, as in training."""

import pytest
from PIL import Image

from data.config import DataConfig
from data.pictures import PixelPictures
from tests.tiny import picture, tiny_processor
from visionzip.pictures import square, uncropped


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (31, 10), (20, 20)])
def test_the_same_as_training_does(size):
    processor = tiny_processor()
    pictures = PixelPictures(DataConfig.model_validate({"sources": [{"path": "x.json"}]}), processor)
    shown = picture(0, size)
    from data.media import pad_to_square

    assert pictures.pad
    assert uncropped(processor, shown).tobytes() == pad_to_square(shown, pictures.colour).tobytes()


def test_a_processor_that_does_not_crop():
    processor = tiny_processor()
    processor.image_processor.do_center_crop = False
    shown = picture(0, (30, 10))
    assert uncropped(processor, shown) is shown


def test_square():
    padded = square(Image.new("RGB", (30, 10), "white"), (1, 2, 3))
    assert padded.size == (30, 30)
    assert [padded.getpixel((15, y)) for y in (0, 9, 10, 19, 20)] == [(1, 2, 3)] * 2 + [(255,) * 3] * 2 + [(1, 2, 3)]
    assert square(padded, (0, 0, 0)) is padded
