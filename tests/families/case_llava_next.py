"""LLaVA-NeXT: a base image and up to four tiles of 24 × 24 patches."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import slow
from tests.families.case import real_config, tokenizer
from tests.families.case_llava import LlavaCase
from visionzip import ZipConfig

SIDE = 24
TILE = 336


def grid(size: tuple[int, int], pinpoints: list[list[int]], tile: int) -> tuple[int, int]:
    """(rows, columns): of all pinpoints the one in which most of the image's pixels survive, then the least waste."""
    width, height = size

    def merit(point: list[int]) -> tuple[int, int]:
        scale = min(point[1] / width, point[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - point[0] * point[1]

    best = max(pinpoints, key=merit)
    return best[0] // tile, best[1] // tile


class LlavaNextCase(LlavaCase):
    name = "LLaVA-NeXT"
    model_class = "LlavaNextForConditionalGeneration"
    checkpoints = (
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-hf/llava-v1.6-vicuna-13b-hf",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-hf/llava-v1.6-34b-hf",
        "llava-hf/llama3-llava-next-8b-hf",
    )
    special = "budget per tile; the number of placeholders follows the image's size"
    fixture = "llava_next_7b"

    def processor(self) -> Any:
        from transformers import LlavaNextProcessor

        return LlavaNextProcessor(self.image_processor(), tokenizer(*self.media), **self.processor_settings())

    def image_processor(self) -> Any:
        from transformers import LlavaNextImageProcessorPil

        return LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=real_config(self.fixture)["image_grid_pinpoints"],
        )

    def grid(self, size: Any) -> tuple[int, int]:
        """`size`: (height, width), as in image_sizes."""
        height, width = (int(side) for side in size)
        return grid((width, height), real_config(self.fixture)["image_grid_pinpoints"], TILE)

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found = []
        for tiles, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
            rows, columns = self.grid(size)
            dominant, contextual = slow.budget(config, 577)
            layer = model.config.vision_feature_layer
            kept = slow.clip_tiles(model.model.vision_tower, tiles[: rows * columns + 1], layer, dominant, contextual)
            (base, _), others = kept[0], kept[1:]
            order = slow.raster([places for _, places in others], columns, SIDE, cls=True)
            packed = [*base]
            packed += [others[tile][0][place] for tile, place in order]
            packed += [tokens[0] for tokens, _ in others]
            packed += [token for tokens, _ in others for token in tokens[dominant:]]
            found.append(model.model.multi_modal_projector(torch.stack(packed)))
        return {"image": found}

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found = []
        for tiles, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
            rows, columns = self.grid(size)
            output = model.model.vision_tower(tiles[: rows * columns + 1], output_hidden_states=True)
            tokens = model.model.multi_modal_projector(output.hidden_states[model.config.vision_feature_layer])
            stitched = tokens[1:, 1:].unflatten(1, (SIDE, SIDE)).unflatten(0, (rows, columns))
            found.append(torch.cat([tokens[0], stitched.transpose(1, 2).flatten(0, 3), tokens[1:, 0]]))
        return {"image": found}

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        rows, columns = self.grid((size[1], size[0]))
        return (rows * columns + 1) * sum(slow.budget(config, 577))


CASE = LlavaNextCase()
