"""A sample's images → the image inputs of a model's forward, and the placeholders each needs in the text.

This is the seam between text and pixels: a dataset is given any callable of this shape, so images can as well come from
tokens computed before.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Protocol

from PIL import Image

from data.config import DataConfig
from data.elastic import Budget
from data.sample import Media, Reject, Sample, rejecting
from visionzip.images import decode_image, padding_colour, pads_images, prepare_image
from visionzip.inputs import ImageInputs, process_images
from visionzip.video import decode_video

AT_BUDGET = "images_at_budget"
"""In a batch of pixels whose samples have budgets of their own: ``(budget, image inputs)`` of each row with images."""


class LoadImages(Protocol):
    def __call__(self, sample: Sample) -> ImageInputs:
        """Raises `Reject` for a sample whose images can't be used."""

    def blank(self) -> ImageInputs:
        """An image of nothing, for a batch that has none."""


class PixelImages:
    """Decodes the files and runs the processor's own image and video processors.

    Args:
        counts: budget → how many placeholders an image needs at it (`visionzip.families.stand_ins.TokenCount`), where samples have
            budgets of their own. Their items get `AT_BUDGET`.
    """

    def __init__(self, config: DataConfig, processor: Any, counts: Mapping[Budget, Any] | None = None) -> None:
        self.processor, self.counts = processor, counts or {}
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
            return self._process([self.prepared(media) for media in sample.media], sample.budget)

    def blank(self) -> ImageInputs:
        return self._process([Image.new("RGB", (32, 32), self.colour)], next(iter(self.counts), None))

    def _process(self, media: list[Image.Image | list[Image.Image]], budget: Budget | None) -> ImageInputs:
        found = process_images(self.processor, media)
        if budget is None or not media:
            return found
        numbers = (
            itertools.count()
        )  # of images: a video is its frames, for the families that have budgets for each image
        frames = [len(each) if isinstance(each, list) else 1 for each in media]
        tokens = [sum(self.counts[budget].of_input(found.inputs, next(numbers)) for _ in range(n)) for n in frames]
        return ImageInputs({AT_BUDGET: [(budget, found.inputs)]}, [self.processor.image_token * n for n in tokens])

    def prepared(self, media: Media) -> Image.Image | list[Image.Image]:
        """The image as the image processor is given it; a video is a list of frames."""
        if media.kind == "video":
            frames = decode_video(media.source, self.frames, self.max_pixels)
            return [prepare_image(frame, self.processor, self.pad_images) for frame in frames]
        if isinstance(media.source, list):
            raise Reject("wrong type", "an image can't be a list of files")
        return prepare_image(decode_image(media.source, self.max_pixels), self.processor, self.pad_images)
