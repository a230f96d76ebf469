"""LLaVA-1.5: one image, one grid of 24 × 24 patches."""

from __future__ import annotations

from typing import Any

from tests.families import slow
from tests.families.case import WORDS, Case, real_config, text_shrunken, tokenizer
from visionzip import ZipConfig

CLIP_SHRUNKEN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


class LlavaCase(Case):
    name = "LLaVA-1.5"
    model_class = "LlavaForConditionalGeneration"
    checkpoints = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")
    special = "one image, one budget"
    fixture = "llava_1_5_7b"
    exempt = {"video": "does not support videos"}  # noqa: RUF012
    media = ("<image>",)

    def config(self) -> Any:
        from transformers import AutoConfig

        values = real_config(self.fixture)
        values["text_config"] |= text_shrunken(len(self.media))
        values["vision_config"] |= CLIP_SHRUNKEN
        ids = {word.strip("<>") + "_token_index": len(WORDS) + index for index, word in enumerate(self.media)}
        return AutoConfig.for_model(**(values | ids))

    def processor(self) -> Any:
        from transformers import LlavaProcessor

        return LlavaProcessor(self.image_processor(), tokenizer(*self.media), **self.processor_settings())

    def image_processor(self) -> Any:
        from transformers import CLIPImageProcessorPil

        side = real_config(self.fixture)["vision_config"]["image_size"]
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def processor_settings(self) -> dict[str, Any]:
        values = real_config(self.fixture)
        return {
            "patch_size": values["vision_config"]["patch_size"],
            "vision_feature_select_strategy": values["vision_feature_select_strategy"],
            "num_additional_image_tokens": 1,
        }

    def everything(self) -> ZipConfig:
        return ZipConfig(dominant=577, contextual=0)

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        kept = slow.clip_tiles(
            model.model.vision_tower,
            inputs["pixel_values"],
            model.config.vision_feature_layer,
            *slow.budget(config, 577),
        )
        return {"image": [model.model.multi_modal_projector(tokens) for tokens, _ in kept]}

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found = model.model.get_image_features(inputs["pixel_values"], vision_feature_select_strategy="full")
        return {"image": list(found.pooler_output)}

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        return sum(slow.budget(config, 577))


CASE = LlavaCase()
