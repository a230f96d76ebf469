"""Gemma 3: 64 × 64 patches, pooled by 4 inside the projector."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import slow, slow_grouped
from tests.families.case import WORDS, Case, real_config, text_shrunken, tokenizer
from visionzip import ZipConfig

SPECIAL = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")


class Gemma3Case(Case):
    name = "Gemma 3"
    model_class = "Gemma3ForConditionalGeneration"
    checkpoints = ("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it")
    special = "groups of 4 × 4 after pooling; an image's tokens attend both ways"
    fixture = "gemma3_4b"
    image_text = "<start_of_image>"
    nested = True
    sizes = ((320, 240), (150, 350))
    exempt = {"video": "does not support videos"}  # noqa: RUF012

    def config(self) -> Any:
        from transformers import AutoConfig

        values = real_config(self.fixture)
        values["text_config"] |= text_shrunken(len(SPECIAL)) | {"query_pre_attn_scalar": 12}
        values["text_config"] |= {"layer_types": ["sliding_attention", "full_attention"]}
        values["vision_config"] |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        values["vision_config"] |= {"num_attention_heads": 1}  # its map of 4096 × 4096 is what takes the time
        ids = {"image_token_id": len(WORDS), "boi_token_id": len(WORDS) + 1, "eoi_token_id": len(WORDS) + 2}
        ids |= {name.replace("_id", "_index"): value for name, value in ids.items()}
        return AutoConfig.for_model(**(values | ids))

    def processor(self) -> Any:
        from transformers import Gemma3ImageProcessor, Gemma3Processor

        words = tokenizer(*SPECIAL)
        names = ("image_token", "boi_token", "eoi_token")
        words._set_model_specific_special_tokens(dict(zip(names, SPECIAL, strict=True)))
        return Gemma3Processor(Gemma3ImageProcessor(**real_config(self.fixture)["_preprocessor"]), words)

    def everything(self) -> ZipConfig:
        return ZipConfig(dominant=256, contextual=0)

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        inner, pixels = model.model, inputs["pixel_values"]
        patches = slow_grouped.given_to(inner.multi_modal_projector, lambda: inner.get_image_features(pixels))
        blocks = slow_grouped.members(64, 4)
        vectors = torch.stack([patches[:, block].mean(1) for block in blocks], dim=1)
        maps, keys = slow_grouped.last_layer(inner.vision_tower, pixels, "self_attn")
        kept = slow_grouped.compress(maps, keys, vectors, 4, 0, config)
        projector = inner.multi_modal_projector
        normed = [projector.mm_soft_emb_norm(tokens) for tokens in kept]
        return {"image": [tokens @ projector.mm_input_projection_weight for tokens in normed]}

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        return {"image": list(model.model.get_image_features(inputs["pixel_values"]).pooler_output)}

    def logits(self, model: Any, inputs: dict[str, Any], features: dict[str, Any]) -> Any:
        ids = inputs["input_ids"]
        rows = [list(row) for row in model.get_input_embeddings()(ids)]
        places = (ids == model.config.image_token_id).nonzero().tolist()
        for (row, place), visual in zip(places, torch.cat(features["image"]), strict=True):
            rows[row][place] = visual
        spliced = torch.stack([torch.stack(row) for row in rows])
        names = ("attention_mask", "token_type_ids")
        return model(inputs_embeds=spliced, **{name: inputs[name] for name in names}).logits

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        return sum(slow.budget(config, 256))


CASE = Gemma3Case()
