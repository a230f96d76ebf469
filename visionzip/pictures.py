"""Pictures as LLaVA-1.5 is shown them: padded to squares, because its processor cuts off what is outside of the middle one."""

from __future__ import annotations

from typing import Any

from PIL import Image


def crops(processor: Any) -> bool:
    """Would this processor cut off what is outside of a picture's middle square?"""
    images = processor.image_processor
    tiled = getattr(
        images, "image_grid_pinpoints", None
    )  # LLaVA-NeXT's crops a picture only after it was cut into tiles
    return bool(getattr(images, "do_center_crop", False)) and not tiled


def uncropped(processor: Any, picture: Image.Image) -> Image.Image:
    """`picture`, padded to a square with the processor's mean colour where it would be cropped otherwise.

    This is what training does (``data.image_aspect_ratio: auto``) and what LLaVA's ``image_aspect_ratio: pad`` means.
    """
    if not crops(processor):
        return picture
    mean = getattr(processor.image_processor, "image_mean", None) or [0.5, 0.5, 0.5]
    red, green, blue = (int(255 * value) for value in mean)
    return square(picture, (red, green, blue))


def square(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Padded to a square, the picture in the middle."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    padded = Image.new("RGB", (side, side), background)
    padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return padded
