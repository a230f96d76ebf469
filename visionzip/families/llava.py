"""LLaVA-1.5 (`LlavaForConditionalGeneration`): one picture, one grid of patches, a two-layer projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.processing_utils import MultiModalData

from visionzip.config import ZipConfig
from visionzip.encoders import Layer
from visionzip.families.base import FAMILIES, Family, ImageFeatures, VisualTokens, read, shrink, shrink_each


@dataclass
class FixedPlaceholders:
    """Stands in for a processor's ``replace_image_token``: the same number of placeholders for every picture."""

    image_token: str
    count: int

    def __call__(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.count


@dataclass
class FixedCount:
    """Stands in for a processor's ``_get_num_multimodal_tokens``, which serving engines ask for lengths."""

    count: int

    def __call__(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.count] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


class Llava(Family):
    """``(B, 3, height, width)`` → K tokens a picture: CLS, dominant patches in raster order, contextual tokens."""

    per_image_budgets = True

    def layer(self, config: ZipConfig) -> Layer:
        return config.layer if config.layer is not None else self.model.config.vision_feature_layer

    def budget(self, config: ZipConfig) -> tuple[int, int]:
        """``(dominant, contextual)`` in tokens."""
        encoder = self.encoder
        tokens = encoder.tokens(self.model.get_submodule(self.tower))
        return config.resolve(tokens, reserved=int(encoder.has_cls))

    def check(self, config: ZipConfig) -> None:
        layer = self.layer(config)
        self.encoder.layers_run(self.model.get_submodule(self.tower), layer)
        width = self.model.config.vision_config.hidden_size * (1 if isinstance(layer, int) else len(layer))
        stock = self.model.config.vision_feature_layer
        expected = self.model.config.vision_config.hidden_size * (1 if isinstance(stock, int) else len(stock))
        if width != expected:
            raise ValueError(
                f"layer={layer} gives tokens {width} wide, but the projector takes {expected} (vision_feature_layer={stock})"
            )
        self.budget(config)

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        vision = self.model.config.vision_config
        return {
            "image token id": (processor.image_token_id, self.model.config.image_token_id),
            "patch size": (getattr(processor, "patch_size", None), vision.patch_size),
            "picture size": (picture_size(processor.image_processor), vision.image_size),
        }

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        tower = self.model.get_submodule(self.tower)
        with torch.no_grad():
            pixel_values = image_inputs["pixel_values"]
            features = read(self.encoder, tower, pixel_values, self.layer(config), config)
            if config.adaptive is not None:
                return [each.tokens[0] for each in shrink_each(features, config)]
            return list(shrink(features, config).tokens)

    def patches(self, processor: Any, config: ZipConfig) -> list[tuple[object, str, object]]:
        changes: list[tuple[object, str, object]] = [
            (self.model.model, "get_image_features", ImageFeatures(self, config))
        ]
        if processor is not None:
            count = sum(self.budget(config))
            changes.append((processor, "replace_image_token", FixedPlaceholders(processor.image_token, count)))
            changes.append((processor, "_get_num_multimodal_tokens", FixedCount(count)))
        return changes

    def stock_count(self) -> int | None:
        encoder = self.encoder
        without_cls = encoder.has_cls and self.model.config.vision_feature_select_strategy == "default"
        return encoder.tokens(self.model.get_submodule(self.tower)) - int(without_cls)

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        stock = self.stock_count()
        assert stock is not None
        return [(stock, sum(self.budget(config)))] * len(image_inputs["pixel_values"])


FAMILIES.register("llava")(Llava)


def picture_size(image_processor: Any) -> int | None:
    """Side of the square picture an image processor gives, in pixels."""
    for name in ("crop_size", "size"):
        size = getattr(image_processor, name, None)
        if size and (name == "size" or getattr(image_processor, "do_center_crop", True)):
            side = (
                size.get("height") or size.get("shortest_edge")
                if hasattr(size, "get")
                else getattr(size, "height", None)
            )
            if side:
                return int(side)
    return None
