"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`; 7B, 13B, Mistral, 34B): CLIP on a base image and on tiles.

Every tile is compressed on its own with the whole budget, so an image of ``T`` tiles has ``T * K`` tokens and the number of
placeholders follows its size. The order is the authors': the base's block, then over all other tiles the kept patches in
raster order of the stitched image, their CLS tokens, their contextual tokens. What the untouched model does to the stitched
grid, cropping the padding and ending each row with a newline, has no meaning for a few patches out of it and is left out;
authors' code sets one ``image_newline`` only where an image is a single tile, which transformers' class never makes here (a
base always comes with a grid).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import unpad_image

from visionzip.compress import compress_to_budget, part
from visionzip.config import ZipConfig
from visionzip.families.base import FAMILIES, VisualTokens
from visionzip.families.llava import Llava
from visionzip.families.stand_ins import TokenCount
from visionzip.families.tiles import pack_image, tile_grid


@dataclass
class TileCount:
    """One budget for the base and one for each tile of the grid."""

    budget: int
    pinpoints: list[list[int]]
    tile: int

    def of_input(self, inputs: Any, index: int) -> int:
        return self.of_size(inputs["image_sizes"][index])

    def of_size(self, size: Any) -> int:
        rows, columns = tile_grid(size, self.pinpoints, self.tile)
        return (rows * columns + 1) * self.budget


class LlavaNext(Llava):
    """``(B, T_max, 3, side, side)`` and ``image_sizes`` → for each image ``T * K`` tokens."""

    controls = False
    ranked = False  # tiles
    places = False

    inputs: ClassVar[dict[str, tuple[str, ...]]] = {"image": ("pixel_values", "image_sizes")}
    counted: ClassVar[dict[str, str]] = {"image": "image_sizes"}

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        grids = self.grids(image_inputs["image_sizes"])
        counts = [rows * columns + 1 for rows, columns in grids]
        with torch.no_grad():
            tiles = flat_tiles(image_inputs["pixel_values"], counts)
            features = self.encode(config, tiles)
            starts = [sum(counts[:index]) for index in range(len(counts))]
            images = list(zip(starts, counts, grids, strict=True))
            side, cls = self.side, self.encoder.has_cls
            kept = compress_to_budget(features, config)
            return [pack_image(part(kept, start, start + count), grid, side, cls) for start, count, grid in images]

    def split(self, **image_inputs: Any) -> list[dict[str, Any]]:
        pixels = image_inputs.get("pixel_values")
        if pixels is not None and pixels.dim() == 4:  # flat tiles
            counts = [rows * columns + 1 for rows, columns in self.layout(image_inputs)]
            flat_tiles(pixels, counts)
            padded = pixels.new_zeros(len(counts), max(counts), *pixels.shape[1:])
            for place, tiles in enumerate(pixels.split(counts)):
                padded[place, : len(tiles)] = tiles
            image_inputs = {**image_inputs, "pixel_values": padded}
        return super().split(**image_inputs)

    def layout(self, image_inputs: dict[str, Any]) -> list[tuple[int, int]]:
        """The grid of each image, ``(rows, columns)``, the base not counted."""
        return self.grids(image_inputs["image_sizes"])

    @property
    def side(self) -> int:
        """Patches along the side of a tile."""
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size

    def grids(self, image_sizes: Any) -> list[tuple[int, int]]:
        """``(rows, columns)`` for each of ``(B, 2)`` sizes."""
        config = self.model.config
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes  # one wait for a GPU, not B
        return [tile_grid(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes]

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None) or []
        return {
            **super().processor_facts(processor),
            "grid pinpoints": (as_lists(pinpoints), as_lists(self.model.config.image_grid_pinpoints)),
        }

    def placeholder_counts(self, config: ZipConfig) -> dict[str, TokenCount]:
        stock = self.model.config
        pinpoints = as_lists(stock.image_grid_pinpoints)
        return {"image": TileCount(sum(self.budget(config)), pinpoints, stock.vision_config.image_size)}

    def stock_count(self) -> int | None:
        return None  # it depends on the image's size

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        side, budget = self.side, sum(self.budget(config))
        base = side**2 + int(self.model.config.vision_feature_select_strategy == "full")
        found = []
        sizes = torch.as_tensor(image_inputs["image_sizes"]).tolist()
        for size, grid in zip(sizes, self.grids(sizes), strict=True):
            height, width = unpadded(size, grid, side)
            found.append((base + height * (width + 1), (grid[0] * grid[1] + 1) * budget))  # a newline ends each row
        return found


FAMILIES.register("llava_next")(LlavaNext)


def flat_tiles(pixel_values: Tensor, counts: list[int]) -> Tensor:
    """``(B, T_max, C, h, w)``, padded with empty tiles, or ``(ΣT, C, h, w)`` → ``(ΣT, C, h, w)``."""
    if pixel_values.dim() == 5:
        return torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])
    if pixel_values.dim() != 4 or len(pixel_values) != sum(counts):
        raise ValueError(
            f"pixel_values of shape {list(pixel_values.shape)} do not hold the {sum(counts)} tiles that image_sizes stand for; "
            f"pass both as the processor gives them"
        )
    return pixel_values


def unpadded(size: Any, grid: tuple[int, int], side: int) -> tuple[int, int]:
    """``(height, width)`` in patches of the stitched grid once the untouched model has cropped the padding away."""
    stitched = torch.empty(1, grid[0] * side, grid[1] * side, device="meta")
    shape = unpad_image(stitched, [int(length) for length in size]).shape
    return shape[1], shape[2]


def as_lists(pinpoints: Any) -> list[list[int]]:
    return [[int(length) for length in point] for point in pinpoints]
