"""PaliGemma: 16 × 16 patches, each a token, a linear projector; the prompt attends both ways."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import slow_grouped
from tests.families.case import WORDS, real_config, text_shrunken, tokenizer
from tests.families.case_gemma3 import Gemma3Case
from visionzip import ZipConfig


class PaliGemmaCase(Gemma3Case):
    name = "PaliGemma"
    model_class = "PaliGemmaForConditionalGeneration"
    checkpoints = ("google/paligemma-3b-mix-224", "google/paligemma2-3b-mix-224", "google/paligemma-3b-mix-448")
    special = "each patch a token; the whole prompt attends both ways"
    fixture = "paligemma_3b_224"
    image_text = "<image>"
    exempt = {  # noqa: RUF012
        "video": "does not support videos",
        "multi_turn": "attention is bidirectional, so a longer prompt changes cached states; also in the untouched model",
    }

    def config(self) -> Any:
        from transformers import AutoConfig

        values = real_config(self.fixture)
        values["text_config"] |= text_shrunken(1 + 1152)  # the processor adds <loc…> and <seg…>
        values["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        values["vision_config"] |= {"num_attention_heads": 4, "projection_dim": 48}
        ids = {"image_token_id": len(WORDS), "image_token_index": len(WORDS)}
        return AutoConfig.for_model(**(values | ids | {"projection_dim": 48, "hidden_size": 48}))

    def processor(self) -> Any:
        from transformers import PaliGemmaProcessor, SiglipImageProcessor

        images = SiglipImageProcessor(**real_config(self.fixture)["_preprocessor"])
        images.image_seq_length = 256
        words = tokenizer("<image>")
        words.image_token, words.image_token_id = "<image>", words.convert_tokens_to_ids("<image>")
        return PaliGemmaProcessor(images, words)

    def process(self, processor: Any, texts: list[str], images: Any = None, videos: Any = None) -> dict[str, Any]:
        """Row by row, as the processor takes no text without an image."""
        rows, pixels = [], []
        for text, row in zip(texts, images or [[]] * len(texts), strict=True):
            if row:
                made = processor(text=[text], images=[row], return_tensors="pt")
                pixels.append(made["pixel_values"])
                rows.append(made["input_ids"][0])
            else:
                rows.append(processor.tokenizer(text, return_tensors="pt")["input_ids"][0])
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), WORDS.index("<pad>"))
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return made | ({"pixel_values": torch.cat(pixels)} if pixels else {})

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        inner, pixels = model.model, inputs["pixel_values"]
        vectors = slow_grouped.given_to(inner.multi_modal_projector, lambda: inner.get_image_features(pixels))
        maps, keys = slow_grouped.last_layer(inner.vision_tower, pixels, "self_attn")
        kept = slow_grouped.compress(maps, keys, vectors, 1, 0, config)
        return {"image": [inner.multi_modal_projector(tokens) for tokens in kept]}


CASE = PaliGemmaCase()
