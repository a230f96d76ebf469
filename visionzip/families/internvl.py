"""InternVL3 (`InternVLForConditionalGeneration`): tiles of 448 pixels, pixel shuffle, a projector that starts with a norm.

Selection stands after the pixel shuffle (`visionzip.families.grouped` says why): of a tile's 256 groups of 2 × 2 patches ``K`` are
kept. CLS is dropped as the untouched model drops it, as it has no place in a shuffle; `visionzip.encoders.internvit`
says why it does not score either. A video is a number of tiles, one per frame, so it needs nothing of its own.
"""

from __future__ import annotations

from torch import Tensor

from visionzip.config import ZipConfig
from visionzip.encoders import Layer
from visionzip.families.base import FAMILIES
from visionzip.families.grouped import Grouped


class InternVL(Grouped):
    """``C = 4·D``: the patches of a group side by side."""

    @property
    def side(self) -> int:
        return round(1 / self.model.config.downsample_ratio)

    @property
    def stock_layer(self) -> Layer:
        return self.model.config.vision_feature_layer

    def normed(self, tokens: Tensor, layer: Layer) -> Tensor:
        """As the model does it: its last norm counts where -1 is asked for, and only there."""
        return self.model.model.vision_tower.layernorm(tokens) if layer == -1 else tokens

    def join(self, tokens: Tensor) -> Tensor:
        length = round(tokens.shape[1] ** 0.5)
        square = tokens.unflatten(1, (length, length))
        return self.model.model.pixel_shuffle(square, scale_factor=self.model.config.downsample_ratio).flatten(1, 2)

    def check(self, config: ZipConfig) -> None:
        layer = self.layer(config)
        if not isinstance(layer, int):
            raise ValueError(f"layer={layer}: {type(self.model).__name__} reads one layer; choose one")
        super().check(config)


FAMILIES.register("internvl")(InternVL)
