"""What is done to images before an image processor sees them: training and everything else goes through here.

Decoding itself is in `visionzip.decode`, which needs neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

from visionzip.decode import (
    FORMATS,
    LARGEST_PADDED_SIDE,
    MAX_PIXELS,
    SMALLEST_SIDE,
    Colour,
    ImageError,
    as_spelled,
    decode_image,
    enlarge,
    open_regular,
    pad_to_square,
    to_rgb,
)

__all__ = [
    "FORMATS", "LARGEST_PADDED_SIDE", "MAX_PIXELS", "SMALLEST_SIDE", "Colour", "ImageError", "PadImages", "PaddedImages", "as_spelled",
    "decode_image", "enlarge", "open_regular", "pad_to_square", "padding_colour", "pads_images", "prepare_image", "to_rgb",
]  # fmt: skip

PadImages = bool | Literal["auto"]


def prepare_image(image: Image.Image, processor: Any, pad_images: PadImages = "auto") -> Image.Image:
    """What an image processor is given: RGB, padded to a square where `pad_images` says so, no side below `SMALLEST_SIDE`.

    Args:
        pad_images: as `ZipConfig.pad_images`. Preparing an image twice changes nothing.
    """
    image = to_rgb(image)
    if pads_images(processor, pad_images):
        image = pad_to_square(image, padding_colour(processor))
    return enlarge(image)


def pads_images(processor: Any, pad_images: PadImages = "auto") -> bool:
    """Whether images are padded for this processor. ``"auto"``: where it would crop them to the middle square otherwise.

    CLIP's processor does, and LLaVA-1.5 is trained on padded images for that reason; LLaVA-NeXT's crops an image only after it
    was cut into tiles.
    """
    if pad_images != "auto":
        return pad_images
    images = processor.image_processor
    return bool(getattr(images, "do_center_crop", False)) and not getattr(images, "image_grid_pinpoints", None)


def padding_colour(processor: Any) -> Colour:
    """The processor's mean colour, rounded down as LLaVA does; black where it has none. It becomes zeros."""
    red, green, blue = getattr(processor.image_processor, "image_mean", None) or (0.0, 0.0, 0.0)
    return int(red * 255), int(green * 255), int(blue * 255)


@dataclass
class PaddedImages:
    """Stands in for a processor's ``_process_images``: ``processor(images=...)`` pads to squares first.

    ``processor.image_processor`` itself stays as it is: what it holds is written to its config file.
    """

    processor: Any

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        return type(self.processor)._process_images(self.processor, self._padded(images), **kwargs)

    def _padded(self, images: Any) -> Any:
        """Images in whatever nesting and form transformers takes them."""
        if isinstance(images, list | tuple):
            return [self._padded(image) for image in images]
        if isinstance(images, Image.Image):
            return pad_to_square(to_rgb(images), padding_colour(self.processor))
        if getattr(images, "ndim", 0) == 4:
            return [self._padded(image) for image in images]
        return self._padded_array(images) if getattr(images, "ndim", 0) == 3 else images

    def _padded_array(self, image: Any) -> Any:
        """``(C, height, width)`` or ``(height, width, C)``, numpy or torch, in the same form."""
        values = torch.as_tensor(image)
        first = infer_channel_dimension_format(values.numpy(), num_channels=(1, 3, 4)) is ChannelDimension.FIRST
        pixels = values if first else values.permute(2, 0, 1)
        channels, height, width = pixels.shape
        if height == width:
            return image
        images = self.processor.image_processor
        colour = torch.tensor([*padding_colour(self.processor), 255][:channels], dtype=torch.float32)
        if values.is_floating_point() and not getattr(images, "do_rescale", True):
            colour = colour / 255
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        square = colour.to(values.dtype).view(-1, 1, 1).repeat(1, side, side)
        square[:, top : top + height, left : left + width] = pixels
        square = square if first else square.permute(1, 2, 0)
        return square.numpy() if isinstance(image, np.ndarray) else square
