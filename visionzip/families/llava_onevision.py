"""LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`, 0.5B and 7B): SigLIP without CLS; tiles, several images, video.

No authors' code exists for this family; what is decided here, and why:

- **One image in a prompt** is cut into tiles as in LLaVA-NeXT and treated likewise: every tile is compressed on its own
  *before* the untouched model's unpadding, its newlines and its bilinear shrinking, in the order of `tiles.pack_image`
  without the CLS part. After them there would be no tiles: a shrunken grid mixes patches across tile borders, which attention
  never crossed and whose scores can't be compared.
- **At most nine tiles' worth** (``anyres_max_9``). The untouched model shrinks larger grids to about nine tiles' patches. A
  budget a tile without that limit would give an image of 6 × 6 tiles a third of its tokens where others get a tenth, so the
  grid's tiles share what nine would get, rounded down.
- **Several images in a prompt** are one tile each; there the untouched model sets one ``image_newline`` after the patches,
  and so do we (as the authors do for a single tile): ``K + 1`` tokens. It is not trained.
  An image alone and the same image among others are therefore two different inputs (``batch_num_images`` says which), and a
  conversation that begins with one image can't go on with a second on the same cache, here as in the untouched model.
- **Video**: the untouched model projects all 27 × 27 patches of a frame, pools them to 14 × 14, and sets one newline after the
  last frame. We choose among the 14 × 14: choosing before would either merge patches that are no neighbours or show the LLM
  unpooled ones. Scores and keys are pooled with the same weights; of each kept position the four patches it is made of go
  through the projector and are pooled after it, so a kept token is exactly the untouched model's. Contextual tokens merge
  corner by corner, with the pooling weights of their target. A budget is of the 196 positions of a frame.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.compress import compress_to_budget, part
from visionzip.config import ZipConfig
from visionzip.families.base import FAMILIES, VisualTokens
from visionzip.families.llava_next import LlavaNext, TileCount, as_lists, flat_tiles, unpadded
from visionzip.families.stand_ins import TokenCount
from visionzip.families.tiles import pack_tiles, tile_grid
from visionzip.families.video import (
    FrameCount,
    bilinear_corners,
    frame_budget,
    pool,
    stacked,
)
from visionzip.selectors import rows

Budget = tuple[int, int]


@dataclass
class OnevisionCount(TileCount):
    """One image in a prompt: its tiles; several: one budget and a newline each."""

    whole: Budget = (0, 0)
    most: int = 0

    def of_input(self, inputs: Any, index: int) -> int:
        if are_alone(inputs.get("batch_num_images"), index + 1)[index]:
            return super().of_input(inputs, index)
        return self.budget + 1

    def of_size(self, size: Any) -> int:
        high, wide = tile_grid(size, self.pinpoints, self.tile)
        return self.budget + high * wide * sum(share(self.whole, high * wide, self.most))


class LlavaOnevision(LlavaNext):
    """Images: ``(L, D)``, or ``{"tokens", "newline"}`` where there are several; videos: ``{"tokens", "weights", "newline"}``.

    ``newline`` is a flag: the embedding itself is the LLM's and is set by `project`.
    """

    per_image_budgets = False
    alone_differs = True
    inputs: ClassVar[dict[str, tuple[str, ...]]] = {
        "image": (*LlavaNext.inputs["image"], "batch_num_images"),
        "video": ("pixel_values_videos",),
    }

    def check(self, config: ZipConfig) -> None:
        super().check(config)
        if self.encoder.has_cls:
            raise ValueError(
                f"{type(self.model.get_submodule(self.tower)).__name__} has a CLS token; LLaVA-OneVision lays its patches out as a "
                f"grid and is supported with an encoder without one (SigLIP)"
            )

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        with torch.no_grad():
            found: list[VisualTokens] = []
            if image_inputs.get("pixel_values") is not None:
                found += self._images(config, image_inputs)
            if image_inputs.get("pixel_values_videos") is not None:
                found += [self._video(config, frames) for frames in image_inputs["pixel_values_videos"]]
            return found

    def _images(self, config: ZipConfig, inputs: dict[str, Any]) -> list[VisualTokens]:
        grids = self.layout(inputs)
        counts = [high * wide + 1 for high, wide in grids]
        starts = [sum(counts[:index]) for index in range(len(counts))]
        features = self.encode(config, flat_tiles(inputs["pixel_values"], counts))
        whole, most = self.budget(config), self.max_tiles
        bases = compress_to_budget(rows(features, starts), config)

        others: dict[int, Tensor] = {}  # image → its grid's tokens
        same: dict[Budget, list[int]] = {}  # images whose tiles have the same budget are compressed at once
        for index, count in enumerate(counts):
            if count > 1:
                same.setdefault(share(whole, count - 1, most), []).append(index)
        for budget, members in same.items():
            tiles = [starts[index] + tile for index in members for tile in range(1, counts[index])]
            kept, place = compress_to_budget(rows(features, tiles), config, budget), 0
            for index in members:
                mine, place = part(kept, place, place + counts[index] - 1), place + counts[index] - 1
                others[index] = pack_tiles(mine.tokens, mine.kept, budget[1], grids[index], self.side, False)
        return [
            torch.cat((base, others[index])) if index in others else {"tokens": base, "newline": torch.tensor(True)}
            for index, base in enumerate(bases.tokens)
        ]

    def _video(self, config: ZipConfig, frames: Tensor) -> VisualTokens:
        side = self.side
        found = self.encode(config, frames)
        places, weights = bilinear_corners(side, pooled_side(side), found.hidden_states.device)
        features = pool(found, places, weights)
        kept = compress_to_budget(features, config)
        chosen = torch.cat((kept.kept, kept.targets), dim=1)  # (F, K)
        return {
            "tokens": kept.tokens.flatten(0, 1).unflatten(-1, (4, -1)),  # (F·K, 4, D)
            "weights": weights[chosen].flatten(0, 1),  # (F·K, 4)
            "newline": torch.tensor(True),
        }

    def project(self, visual_tokens: list[VisualTokens]) -> list[Tensor]:
        tokens = [one if isinstance(one, Tensor) else one["tokens"].flatten(0, -2) for one in visual_tokens]
        found = super().project(cast(list[VisualTokens], tokens))
        for index, (one, embeddings) in enumerate(zip(visual_tokens, found, strict=True)):
            if isinstance(one, dict) and "weights" in one:
                embeddings = (embeddings.unflatten(0, (-1, 4)) * one["weights"].to(embeddings).unsqueeze(-1)).sum(1)
            if isinstance(one, dict) and "newline" in one:
                newline = self.model.model.image_newline
                embeddings = torch.cat((embeddings, newline[None].to(embeddings)))
            found[index] = embeddings
        return found

    def encoder_output(self, embeddings: list[Tensor], kind: str = "image") -> BaseModelOutputWithPooling:
        return super().encoder_output(embeddings, kind) if kind == "image" else stacked(embeddings)

    @property
    def max_tiles(self) -> int:
        """The 9 of ``anyres_max_9``."""
        ratio = self.model.config.vision_aspect_ratio
        found = re.search(r"(\d+)$", ratio)
        if found is None:
            raise ValueError(f"vision_aspect_ratio={ratio!r}; expected 'anyres_max_<number>'")
        return int(found.group(1))

    def split(self, **image_inputs: Any) -> list[dict[str, Any]]:
        """One prompt's worth each: an image that is not alone in its prompt stays one that is not."""
        numbers = image_inputs.get("batch_num_images")
        parts = super().split(**{**image_inputs, "batch_num_images": None})
        alone = are_alone(numbers, sum("pixel_values" in part for part in parts))
        for place, own in enumerate(alone):
            if numbers is not None:
                parts[place] = {**parts[place], "batch_num_images": torch.tensor([1 if own else 2])}
        return parts

    def compress_each(self, configs: list[ZipConfig], **image_inputs: Any) -> list[VisualTokens]:
        parts = self.split(**image_inputs)
        if len(parts) != len(configs):
            return super().compress_each(configs, **image_inputs)  # which says so
        return [self.compress(config, **part)[0] for config, part in zip(configs, parts, strict=True)]

    def layout(self, inputs: dict[str, Any]) -> list[tuple[int, int]]:
        """The grid of each image, ``(rows, columns)``; ``(0, 0)`` for one that shares its prompt with others."""
        sizes = inputs["image_sizes"]
        alone = are_alone(inputs.get("batch_num_images"), len(sizes))
        return [grid if own else (0, 0) for grid, own in zip(self.grids(sizes), alone, strict=True)]

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        facts = super().processor_facts(processor)
        del facts["patch size"]  # this processor is told the number of tokens instead
        return {
            **facts,
            "video token id": (processor.video_token_id, self.model.config.video_token_id),
            "tokens of a tile": (getattr(processor, "num_image_tokens", None), self.side**2),
        }

    def placeholder_counts(self, config: ZipConfig) -> dict[str, TokenCount]:
        stock, whole = self.model.config, self.budget(config)
        pinpoints, side = as_lists(stock.image_grid_pinpoints), stock.vision_config.image_size
        images = OnevisionCount(sum(whole), pinpoints, side, whole, self.max_tiles)
        return {"image": images, "video": FrameCount(sum(self.frame_budget(config)), extra=1)}

    def frame_budget(self, config: ZipConfig) -> Budget:
        """``(dominant, contextual)`` of one frame's pooled positions."""
        return frame_budget(config, pooled_side(self.side) ** 2)

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        found = []
        side, whole, most = self.side, self.budget(config), self.max_tiles
        if image_inputs.get("pixel_values") is not None:
            for size, (high, wide) in zip(image_inputs["image_sizes"], self.layout(image_inputs), strict=True):
                tiles = high * wide
                if tiles == 0:
                    found.append((side**2 + 1, sum(whole) + 1))
                else:
                    stock = side**2 + with_newlines(unpadded(size, (high, wide), side), side, most)
                    found.append((stock, sum(whole) + tiles * sum(share(whole, tiles, most))))
        for frames in image_inputs.get("pixel_values_videos", ()):
            budget = sum(self.frame_budget(config))
            found.append((len(frames) * pooled_side(side) ** 2 + 1, len(frames) * budget + 1))
        return found


FAMILIES.register("llava_onevision")(LlavaOnevision)


def are_alone(batch_num_images: Any, images: int) -> list[bool]:
    """For each image whether it is its prompt's only one. Without the numbers each is taken to be.

    A later turn brings its new images alone, but the numbers of its whole conversation: the first ones decide, as in
    transformers' own code.
    """
    if batch_num_images is None:
        return [True] * images
    if isinstance(batch_num_images, Tensor):
        batch_num_images = batch_num_images.tolist()
    return [int(number) == 1 for number in batch_num_images for _ in range(int(number))][:images]


def share(whole: Budget, tiles: int, most: int) -> Budget:
    """A tile's budget in a grid of `tiles`: the whole one up to `most` tiles, above that what `most` get, shared."""
    if tiles <= most:
        return whole
    return max(1, whole[0] * most // tiles), whole[1] * most // tiles


def pooled_side(side: int) -> int:
    return math.ceil(side / 2)


def with_newlines(grid: tuple[int, int], side: int, most: int) -> int:
    """Tokens of an unpadded grid (patches high, wide) in the untouched model: shrunk to `most` tiles, a newline a row."""
    ratio = math.sqrt(grid[0] * grid[1] / (most * side**2))
    high, wide = (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid
    return high * (wide + 1)
