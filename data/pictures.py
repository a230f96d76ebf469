"""A sample's pictures → the image inputs of a model's forward, and the placeholders each picture needs in the text.

This is the seam between text and pixels: a dataset is given any callable of this shape, so pictures can as well come from
tokens computed before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image

from data.config import DataConfig
from data.media import at_least, native_video, open_image, pad_to_square, read_frames
from data.sample import Media, Reject, Sample


@dataclass(slots=True)
class Pictures:
    """`inputs`: what goes into `forward`, pictures on dim 0 (`pixel_values`, …; or `visual_tokens`, a list of (L_i, D)).

    `placeholders[k]`: the text that stands for the media of index `k`, one placeholder a visual token.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    placeholders: list[str] = field(default_factory=list)


class LoadPictures(Protocol):
    def __call__(self, sample: Sample) -> Pictures:
        """Raises `Reject` for a sample whose pictures can't be used."""

    def blank(self) -> Pictures:
        """A picture of nothing, for a batch that has none."""


class PixelPictures:
    """Reads the files and runs the processor's own image and video processors."""

    def __init__(self, config: DataConfig, processor: Any) -> None:
        self.processor = processor
        self.frames = config.frames
        self.max_pixels = config.max_pixels
        self.native_video = native_video(processor)
        image_processor = processor.image_processor
        self.pad = config.image_aspect_ratio == "pad" or (
            config.image_aspect_ratio == "auto" and _crops_to_square(image_processor)
        )
        mean = getattr(image_processor, "image_mean", None) or (0.0, 0.0, 0.0)
        self.colour: tuple[int, int, int] = tuple(int(value * 255) for value in mean)  # type: ignore[assignment]

    def __call__(self, sample: Sample) -> Pictures:
        images: list[Image.Image] = []
        videos: list[list[Image.Image]] = []
        counts: list[tuple[str, int]] = []
        for media in sample.media:
            pictures = self._read(media)
            if media.kind == "video" and self.native_video:
                videos.append(pictures)
                counts.append(("video", 1))
            else:
                images += pictures
                counts.append(("image", len(pictures)))
        return self._process(images, videos, counts)

    def blank(self) -> Pictures:
        side = 32
        return self._process([Image.new("RGB", (side, side), self.colour)], [], [("image", 1)])

    def _read(self, media: Media) -> list[Image.Image]:
        if media.kind == "image":
            if isinstance(media.source, list):
                raise Reject("wrong type", "a picture can't be a list of files")
            pictures = [open_image(media.source, self.max_pixels)]
        else:
            pictures = read_frames(media, self.frames, self.max_pixels)
        return [at_least(pad_to_square(picture, self.colour) if self.pad else picture) for picture in pictures]

    def _process(
        self, images: list[Image.Image], videos: list[list[Image.Image]], counts: list[tuple[str, int]]
    ) -> Pictures:
        """Run the processors over all pictures of a sample at once, then ask how many placeholders each needs."""
        inputs: dict[str, Any] = {}
        image_texts: list[str] = []
        video_texts: list[str] = []
        try:
            if images:
                options = {**getattr(self.processor, "images_kwargs", {}), "return_tensors": "pt"}
                # A list in a list: some processors go by how many pictures share a prompt (OneVision tiles only a single one).
                found = self.processor.image_processor(images=[images], **options)
                image_texts = [self.processor.replace_image_token(found, index) for index in range(len(images))]
                inputs.update(found)
            if videos:
                options = {"do_sample_frames": False, "return_metadata": True, "return_tensors": "pt"}
                found = self.processor.video_processor(videos=videos, **options)
                video_texts = [self.processor.replace_video_token(found, index) for index in range(len(videos))]
                found.pop("video_metadata", None)  # when its frames are of: for the placeholders, not for the model
                inputs.update(found)
        except (ValueError, ZeroDivisionError, OverflowError) as error:  # e.g. Qwen refuses 200 times as wide as high
            raise Reject("picture refused", f"by the image processor: {error}") from error
        queues = {"image": iter(image_texts), "video": iter(video_texts)}
        unused = set(getattr(self.processor, "unused_input_names", ()))
        return Pictures(
            {name: _tensor(value) for name, value in inputs.items() if name not in unused},
            ["".join(next(queues[kind]) for _ in range(count)) for kind, count in counts],
        )


def _tensor(value: Any) -> Any:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)


def _crops_to_square(image_processor: Any) -> bool:
    """Whether what is outside the middle square would be cut off, as CLIP's processor does: that is what padding prevents."""
    return bool(getattr(image_processor, "do_center_crop", False)) and not getattr(
        image_processor, "image_grid_pinpoints", None
    )
