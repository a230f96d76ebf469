"""A sample's images → the image inputs of a model's forward, and the placeholders each needs in the text.

This is the seam between text and pixels: a dataset is given any callable of this shape, so images can as well come from
tokens computed before.
"""

from __future__ import annotations

from typing import Any, Protocol

from PIL import Image

from data.config import DataConfig
from data.sample import Media, Reject, Sample, rejecting
from visionzip.images import decode_image, padding_colour, pads_images, prepare_image
from visionzip.inputs import ImageInputs, process_images
from visionzip.video import decode_video


class LoadImages(Protocol):
    def __call__(self, sample: Sample) -> ImageInputs:
        """Raises `Reject` for a sample whose images can't be used."""

    def blank(self) -> ImageInputs:
        """An image of nothing, for a batch that has none."""


class PixelImages:
    """Decodes the files and runs the processor's own image and video processors."""

    def __init__(self, config: DataConfig, processor: Any) -> None:
        self.processor = processor
        self.frames = config.frames
        self.max_pixels = config.max_pixels
        self.pad_images = config.pad_images
        self.colour = padding_colour(processor)

    @property
    def pad(self) -> bool:
        """Whether images are padded to squares, of `colour`."""
        return pads_images(self.processor, self.pad_images)

    def __call__(self, sample: Sample) -> ImageInputs:
        with rejecting():
            return process_images(self.processor, [self.prepared(media) for media in sample.media])

    def blank(self) -> ImageInputs:
        return process_images(self.processor, [Image.new("RGB", (32, 32), self.colour)])

    def prepared(self, media: Media) -> Image.Image | list[Image.Image]:
        """The image as the image processor is given it; a video is a list of frames."""
        if media.kind == "video":
            frames = decode_video(media.source, self.frames, self.max_pixels)
            return [prepare_image(frame, self.processor, self.pad_images) for frame in frames]
        if isinstance(media.source, list):
            raise Reject("wrong type", "an image can't be a list of files")
        return prepare_image(decode_image(media.source, self.max_pixels), self.processor, self.pad_images)
