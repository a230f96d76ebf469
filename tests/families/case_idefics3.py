"""Idefics3: tiles of 364 pixels and the whole image, a pixel shuffle by 2, one linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.families import slow, slow_grouped
from tests.families.case import WORDS, Case, real_config, text_shrunken, tokenizer
from visionzip import ZipConfig

SPECIAL = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")


class Idefics3Case(Case):
    name = "Idefics3"
    needs_transformers = "5.20"
    model_class = "Idefics3ForConditionalGeneration"
    checkpoints = ("HuggingFaceM4/Idefics3-8B-Llama3",)
    special = "budget per tile, of groups after the pixel shuffle"
    fixture = "idefics3_8b"
    per_tile = 169
    sizes = ((640, 480), (300, 700))
    exempt = {"video": "does not support videos"}  # noqa: RUF012

    def config(self) -> Any:
        from transformers import AutoConfig

        values = real_config(self.fixture)
        values["text_config"] |= text_shrunken(len(SPECIAL))
        values["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        values["vision_config"] |= {"num_attention_heads": 4}
        return AutoConfig.for_model(**(values | {"image_token_id": len(WORDS), "pad_token_id": 3}))

    def processor(self) -> Any:
        from transformers import Idefics3ImageProcessor, Idefics3Processor

        images = Idefics3ImageProcessor(**self.settings())
        return Idefics3Processor(images, tokenizer(*SPECIAL), image_seq_len=self.per_tile)

    def settings(self) -> dict[str, Any]:
        """The real ones, but for the largest image, which is 2 tiles and not 4: fewer tiles, as many kinds of them."""
        values = real_config(self.fixture)["_preprocessor"]
        return values | {"size": {"longest_edge": 2 * values["max_image_size"]["longest_edge"]}}

    def process(self, processor: Any, texts: list[str], images: Any = None, videos: Any = None) -> dict[str, Any]:
        made = super().process(processor, texts, images, videos)
        return {name: value for name, value in made.items() if name not in ("rows", "cols")}

    def everything(self) -> ZipConfig:
        return ZipConfig(dominant=self.per_tile, contextual=0)

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        inner, rows = model.model, inputs["pixel_values"]
        projection, found = inner.connector.modality_projection, []
        for tiles in rows:
            real = tiles[[bool(tile.abs().sum() > 0) for tile in tiles]]
            if not len(real):
                found.append(inner.get_input_embeddings().weight[:0])
                continue
            vectors = slow_grouped.given_to(projection, lambda real=real: inner.get_image_features(real[None]))
            maps, keys = slow_grouped.last_layer(inner.vision_model, real, "self_attn")
            kept = slow_grouped.compress(maps, keys, vectors, model.config.scale_factor, 0, config)
            found.append(projection(torch.cat(kept)))
        return {"image": found}

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        return {"image": list(model.model.get_image_features(inputs["pixel_values"]).pooler_output)}

    def logits(self, model: Any, inputs: dict[str, Any], features: dict[str, Any]) -> Any:
        inner = model.model
        inner.language_model = inner.text_model  # its name elsewhere
        try:
            return super().logits(model, inputs, features)
        finally:
            del inner.language_model

    def tiles(self, size: tuple[int, int]) -> int:
        """The longest side becomes `longest`; both are rounded up to whole tiles; then the whole image."""
        settings = self.settings()
        longest, tile = settings["size"]["longest_edge"], settings["max_image_size"]["longest_edge"]
        scale = longest / max(size)
        short = int(min(size) * scale)
        short += short % 2
        counts = [math.ceil(longest / tile), math.ceil(short / tile)]
        return counts[0] * counts[1] + 1

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        return self.tiles(size) * sum(slow.budget(config, self.per_tile))

    def only(self, inputs: dict[str, Any], first: int) -> dict[str, Any]:
        before = sum(self.tiles(self.sizes[index % len(self.sizes)]) for index in range(first))
        names = ("pixel_values", "pixel_attention_mask")
        return inputs | {name: inputs[name][:, before:] for name in names}


CASE = Idefics3Case()
