"""Idefics3 and SmolVLM: tiles of one size and the image as a whole, pixel shuffle by 2 to 4, one linear layer.

Selection stands after the pixel shuffle (`visionzip.families.grouped` says why), for each tile on its own, so that the text the
processor writes around every tile (``<row_1_col_2>``) stays true. With a shuffle of 3 or 4 a tile is down to 169 or 64
tokens before anything is chosen: budgets that are usual for LLaVA keep everything here.

``pixel_values`` is ``(rows, tiles, 3, height, width)``: the tiles of all images in one row of text, short rows filled up with
tiles of zeros, which are dropped. So `compress` gives one entry a row, as the untouched model does.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import ZipConfig
from visionzip.families.base import FAMILIES, VisualTokens
from visionzip.families.grouped import Grouped

#: of transformers: before it, ``mm_encoder_outputs`` was one tensor for all images, whose numbers of tokens differ here
NEEDED = (5, 20)


class Idefics3(Grouped):
    """``C = side²·D``: the patches of a group side by side."""

    projectors: ClassVar[tuple[str, ...]] = ("model.connector.modality_projection",)
    tower: ClassVar[str] = "model.vision_model"
    llm: ClassVar[str] = "model.text_model"
    frozen: ClassVar[dict[str, str]] = {"encoder": tower, "llm": llm}
    inputs: ClassVar[dict[str, tuple[str, ...]]] = {"image": ("pixel_values", "pixel_attention_mask")}
    mixed_budgets: ClassVar[bool] = False  # the model splices tiles of one length
    by_tile: ClassVar[bool] = False
    count_name: ClassVar[str] = "image_seq_len"

    @property
    def side(self) -> int:
        return self.model.config.scale_factor

    def check(self, config: ZipConfig) -> None:
        if tuple(map(int, transformers.__version__.split(".")[:2])) < NEEDED:
            raise ValueError(
                f"{type(self.model).__name__} can be compressed with transformers {'.'.join(map(str, NEEDED))} or newer, this is "
                f"{transformers.__version__}: pip install -U transformers"
            )
        super().check(config)

    def join(self, tokens: Tensor) -> Tensor:
        return self.model.model.connector.pixel_shuffle(tokens, self.model.config.scale_factor)

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        pixel_values = image_inputs["pixel_values"]
        real = real_tiles(pixel_values)
        mask = image_inputs.get("pixel_attention_mask")
        if mask is not None and not bool(mask[real].all()):
            raise ValueError(
                "pixel_attention_mask masks a part of a tile; expected whole tiles, as the model's own image processor makes them"
            )
        tokens = self.tiles(config, pixel_values[real])
        return [tile.flatten(0, 1) for tile in tokens.split(real.sum(dim=1).tolist())]

    def encoder_output(self, embeddings: list[Tensor], kind: str = "image") -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=cast(Any, embeddings))

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        stock, count = self.groups, sum(self.budget(config))
        return [
            (stock * tiles, count * tiles) for tiles in real_tiles(image_inputs["pixel_values"]).sum(dim=1).tolist()
        ]


def real_tiles(pixel_values: Tensor) -> Tensor:
    """``(rows, tiles, 3, height, width)`` → ``(rows, tiles)`` bool: those that are not all zeros."""
    return (pixel_values != 0).flatten(2).any(dim=2)


FAMILIES.register("idefics3", "smolvlm")(Idefics3)
