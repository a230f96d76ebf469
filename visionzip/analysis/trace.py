"""What was kept of an image, tile by tile, for any family: scores, kept patches, merged groups, and their pixels.

Nothing here is specific to a family. The family's own ``compress`` is run on one image under `visionzip.compress.listening`, so
what is shown is what the model receives, whatever the family does before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visionzip.attach import Attachment, attached
from visionzip.compress import DROPPED, Compressed, compress, listening
from visionzip.config import ZipConfig
from visionzip.families import Family
from visionzip.images import PadImages, prepare_image
from visionzip.inputs import process_images, to_model
from visionzip.selectors import Features

KEPT = -2
"""In `Tile.groups`: this patch is a token of its own. `DROPPED` (-1): it is in no token at all."""


@dataclass(frozen=True)
class Tile:
    """One image, tile or frame as the encoder receives it, and what was kept of it. ``N`` tokens of the encoder, CLS included.

    Attributes:
        image: the encoder's input, as an image.
        grid: ``(rows, columns)`` of patches, after pooling or merging if the family selects after it.
        features: what was selected from, a batch of one.
        kept: ``(dominant,)`` indices of kept tokens among the ``N``, ascending, CLS first if there is one.
        targets: ``(contextual,)`` indices of the tokens that others were merged into.
        slots: ``(N,)`` index of the output token each token went to, or `DROPPED`.
    """

    image: Image.Image
    grid: tuple[int, int]
    features: Features
    kept: Tensor
    targets: Tensor
    slots: Tensor

    @property
    def cls(self) -> int:
        """Number of tokens before the first patch, 0 or 1: patch ``p`` is token ``p + cls``."""
        return self.features.cls

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @cached_property
    def attention(self) -> Tensor | None:
        """``(rows, columns)``: each patch's share of the attention on patches; sums to 1. ``None`` without scores."""
        if self.features.scores is None:
            return None
        scores = self.features.scores[0, self.cls :].float().cpu()
        return (scores / scores.sum().clamp(min=1e-12)).reshape(self.grid)

    @cached_property
    def groups(self) -> Tensor:
        """``(rows, columns)`` int64: the number of the contextual token a patch went into, `KEPT` or `DROPPED`."""
        slots = self.slots[self.cls :].cpu()
        dominant = len(self.kept)
        groups = torch.where(slots >= dominant, slots - dominant, torch.full_like(slots, KEPT))
        return groups.masked_fill(slots == DROPPED, DROPPED).reshape(self.grid)

    @cached_property
    def kept_mask(self) -> Tensor:
        """``(rows, columns)`` bool: the patches that are kept as separate tokens."""
        return self.groups == KEPT

    @property
    def target_patches(self) -> list[int]:
        """Patch number of every contextual token's target, in the order of the tokens."""
        return [int(place) - self.cls for place in self.targets]

    @property
    def held(self) -> float | None:
        """Share of the attention on patches that the kept patches receive."""
        return None if self.attention is None else float(self.attention[self.kept_mask].sum())

    def again(self, config: ZipConfig) -> Tile:
        """The same image with another budget or selector, without running the encoder again."""
        total = self.features.hidden_states.shape[1]
        dominant, contextual = config.resolve(total, reserved=self.cls, cap=True)
        result = compress(self.features, dominant, contextual, selector=config.selector, merge=config.merge)
        return Tile(self.image, self.grid, self.features, result.kept[0], result.targets[0], result.slots[0])


@dataclass(frozen=True)
class Trace:
    """One image or video: its tiles or frames, and its number of visual tokens in the LLM, compressed and uncompressed."""

    image: Image.Image
    tiles: list[Tile]
    tokens: int
    of_tokens: int
    name: str = ""

    @property
    def held(self) -> float | None:
        """Mean over tiles of the share of attention that the kept patches receive."""
        shares = [tile.held for tile in self.tiles if tile.held is not None]
        return sum(shares) / len(shares) if shares else None


def trace(model: Any, image: Image.Image, processor: Any = None, name: str = "") -> Trace:
    """What the attached `model` keeps of `image`.

    Args:
        processor: the processor whose image processor is used; default: the one attached with the model.

    Raises:
        ValueError: if nothing is attached to the model, or there is no processor.
    """
    attachment, processor = _parts(model, processor)
    return _traced(attachment, processor, image_inputs(processor, image, attachment.config.pad_images), [image], name)


def trace_video(model: Any, frames: Sequence[Image.Image], processor: Any = None, name: str = "") -> Trace:
    """What is kept of a video. If the model does not support videos, each frame is a separate image.

    Args:
        frames: the images, already sampled.
    """
    attachment, processor = _parts(model, processor)
    if not frames:
        raise ValueError(f"no frames were given{' of ' + name if name else ''}; expected at least one")
    if getattr(processor, "video_processor", None) is None:
        each = [trace(model, frame, processor) for frame in frames]
        tiles = [tile for one in each for tile in one.tiles]
        return Trace(frames[0], tiles, sum(t.tokens for t in each), sum(t.of_tokens for t in each), name)
    inputs = processor.video_processor(videos=[list(frames)], do_sample_frames=False, return_tensors="pt")
    return _traced(attachment, processor, _known(processor, inputs), list(frames), name)


def trace_inputs(attachment: Attachment, processor: Any, inputs: dict[str, Any], name: str = "") -> Trace:
    """What is kept of inputs that are ready for ``forward``: `pixel_values` and whatever the family needs beside it, for one image."""
    return _traced(attachment, processor, inputs, [], name)


def image_inputs(processor: Any, image: Image.Image, pad_images: PadImages = "auto") -> dict[str, Any]:
    """The inputs of the model's ``forward`` for one image, prepared as `ZipConfig.pad_images` says."""
    return process_images(processor, [prepare_image(image, processor, pad_images)]).inputs


def _traced(
    attachment: Attachment, processor: Any, inputs: dict[str, Any], given: list[Image.Image], name: str
) -> Trace:
    seen: list[tuple[Features, Compressed]] = []
    moved = to_model(attachment.model, inputs)
    with torch.no_grad(), listening(lambda features, result: seen.append((features, result))):
        attachment.compress(**moved)
    rows = [_row(features, result, place) for features, result in seen for place in range(len(result.kept))]
    family = attachment.family
    grids = [family.grid(features.hidden_states.shape[1] - features.cls, inputs) for features, _ in rows]
    images = _images(family, inputs, processor, len(rows))
    tiles = [
        Tile(image, grid, features, result.kept[0], result.targets[0], result.slots[0])
        for image, grid, (features, result) in zip(images, grids, rows, strict=True)
    ]
    counts = attachment.token_counts(**moved)
    return Trace(
        given[0] if given else images[0],
        tiles,
        sum(now for _, now in counts),
        sum(was for was, _ in counts),
        name,
    )


def _parts(model: Any, processor: Any) -> tuple[Attachment, Any]:
    attachment = attached(model)
    if attachment is None:
        raise ValueError(
            "nothing is attached to this model; call visionzip.attach(model, processor, ZipConfig(...)) first"
        )
    processor = processor if processor is not None else attachment.processor
    if processor is None:
        raise ValueError("a processor is needed to turn an image into pixels; pass processor=...")
    return attachment, processor


def _known(processor: Any, inputs: Any) -> dict[str, Any]:
    """The inputs that ``forward`` takes: tensors, without names that the family does not use, such as `video_metadata`."""
    unused = {"video_metadata", *getattr(processor, "unused_input_names", ())}
    return {name: torch.as_tensor(value) for name, value in inputs.items() if name not in unused}


def _row(features: Features, result: Compressed, place: int) -> tuple[Features, Compressed]:
    one = slice(place, place + 1)
    scores = None if features.scores is None else features.scores[one]
    row = Features(features.hidden_states[one], features.metric[one], scores, features.has_cls)
    return row, Compressed(result.tokens[one], result.kept[one], result.targets[one], result.slots[one])


def _images(family: Family, inputs: dict[str, Any], processor: Any, count: int) -> list[Image.Image]:
    """The encoder's input in `count` tiles: their pixels, with the normalisation undone."""
    tiles = family.pixels(inputs)
    if len(tiles) < count:
        raise ValueError(f"these inputs contain no pixels that can be shown (found {', '.join(inputs)})")
    return [unnormalised(tile, processor) for tile in tiles[:count]]


def unnormalised(pixels: Tensor, processor: Any) -> Image.Image:
    """``(3, height, width)`` normalised pixels → the image."""
    images = processor.image_processor
    mean = torch.tensor(getattr(images, "image_mean", None) or [0.0] * 3).view(3, 1, 1)
    spread = torch.tensor(getattr(images, "image_std", None) or [1.0] * 3).view(3, 1, 1)
    values = (pixels.detach().float().cpu() * spread + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
