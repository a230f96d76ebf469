"""LLaVA-1.5 (`LlavaForConditionalGeneration`): one image, one grid of patches, a two-layer projector."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from visionzip.compress import Compressed, compress_to_budget
from visionzip.config import ZipConfig
from visionzip.families.base import FAMILIES, Family, Hook, Patch, VisualTokens
from visionzip.families.positions import (
    OriginalGenerationPositions,
    OriginalPositions,
    PlacedOutput,
    original_positions,
    stock_places,
)
from visionzip.families.stand_ins import FixedCount, TokenCount
from visionzip.selectors import SELECTORS, Features
from visionzip.selectors.pooled import scaled_grid


class Llava(Family):
    """``(B, 3, height, width)`` → K tokens per image: CLS, dominant patches in raster order, contextual tokens."""

    per_image_budgets = True
    controls = True
    ranked = True
    places = True
    plain_positions = True

    def budget(self, config: ZipConfig) -> tuple[int, int]:
        """``(dominant, contextual)`` in tokens."""
        encoder = self.encoder
        tokens = encoder.tokens(self.encoder_module)
        dominant, contextual = config.resolve(tokens, reserved=int(encoder.has_cls))
        if SELECTORS[config.selector].scales:
            return math.prod(scaled_grid(dominant + contextual)), 0
        return dominant, contextual

    def check(self, config: ZipConfig) -> None:
        layer = self.layer(config)
        self.encoder.layers_run(self.encoder_module, layer)
        width = self.model.config.vision_config.hidden_size * (1 if isinstance(layer, int) else len(layer))
        stock = self.model.config.vision_feature_layer
        expected = self.model.config.vision_config.hidden_size * (1 if isinstance(stock, int) else len(stock))
        if width != expected:
            raise ValueError(
                f"layer={layer} gives tokens {width} wide, but the projector takes {expected} (vision_feature_layer={stock})"
            )
        if config.positions == "original" and SELECTORS[config.selector].scales:
            raise ValueError(f"positions=original does not support selector={config.selector}; leave one of them out")
        self.budget(config)

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        vision = self.model.config.vision_config
        return {
            "image token id": (processor.image_token_id, self.model.config.image_token_id),
            "patch size": (getattr(processor, "patch_size", None), vision.patch_size),
            "image size": (image_size(processor.image_processor), vision.image_size),
        }

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        with torch.no_grad():
            kept = self.compress_batch(config, image_inputs["pixel_values"])
            if config.positions == "compact":
                return list(kept.tokens)
            places = self.stock_places(torch.cat((kept.kept, kept.targets), dim=1))
            return [{"tokens": tokens, "places": place} for tokens, place in zip(kept.tokens, places, strict=True)]

    def compress_batch(self, config: ZipConfig, pixel_values: Tensor) -> Compressed:
        return compress_to_budget(self.features(config, pixel_values), config, self.budget(config))

    def features(self, config: ZipConfig, pixel_values: Tensor) -> Features:
        grid = scaled_grid(sum(self.budget(config))) if SELECTORS[config.selector].scales else None
        return self.encode(config, pixel_values, grid=grid)

    def project(self, visual_tokens: list[VisualTokens]) -> list[Tensor]:
        return super().project([each["tokens"] if isinstance(each, dict) else each for each in visual_tokens])

    def outputs(self, visual_tokens: list[VisualTokens], kind: str = "image") -> Any:
        found = super().outputs(visual_tokens, kind)
        places = [each["places"] for each in visual_tokens if isinstance(each, dict) and "places" in each]
        return PlacedOutput(pooler_output=found.pooler_output, places=places) if places else found

    def patches(self, processor: Any, config: ZipConfig) -> list[Patch]:
        found = super().patches(processor, config)
        if config.positions == "original":
            found.append((self.model, "_prepare_position_ids_for_generation", OriginalGenerationPositions(self)))
        return found

    def hooks(self, config: ZipConfig) -> list[Hook]:
        return [(self.model.model, OriginalPositions(self))] if config.positions == "original" else []

    def stock_places(self, token: Tensor) -> Tensor:
        """Places among the encoder's tokens → among those that the untouched model has of an image; any shape."""
        stock, cls = self.stock_count(), int(self.encoder.has_cls)
        assert stock is not None
        return stock_places(token, cls, self.encoder.tokens(self.encoder_module) - cls, stock)

    def original_positions(self, compact: Tensor, input_ids: Tensor, places: list[Tensor]) -> Tensor:
        """``(B, L)`` positions without gaps → those of the uncompressed prompt; `places` of each image, see `compress`."""
        stock = self.stock_count()
        assert stock is not None
        return original_positions(compact, input_ids == self.image_token_id, places, stock)

    def placeholder_counts(self, config: ZipConfig) -> dict[str, TokenCount]:
        return {"image": FixedCount(sum(self.budget(config)))}

    def stock_count(self) -> int | None:
        encoder = self.encoder  # an untouched model hands registers on
        without_cls = encoder.has_cls and self.model.config.vision_feature_select_strategy == "default"
        tower = self.encoder_module
        return encoder.tokens(tower) + encoder.registers(tower) - int(without_cls)

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        stock = self.stock_count()
        assert stock is not None
        return [(stock, sum(self.budget(config)))] * len(image_inputs["pixel_values"])


FAMILIES.register("llava")(Llava)


def image_size(image_processor: Any) -> int | None:
    """Side of the square image an image processor gives, in pixels."""
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
