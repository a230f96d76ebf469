"""LLaVA with DINOv2 (with registers) for CLIP: one image, one grid of 16 × 16 patches. Registers are neither counted nor kept."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import slow
from tests.families.case import WORDS, real_config, text_shrunken
from tests.families.case_llava import LlavaCase
from visionzip import ZipConfig

SIDE, PATCH, REGISTERS = 224, 14, 4
TOKENS = (SIDE // PATCH) ** 2 + 1


class LlavaDinov2Case(LlavaCase):
    name = "LLaVA with DINOv2"
    checkpoints = ("scripts.make_smol_llava",)
    special = "with and without registers, which are not visual tokens"

    def config(self) -> Any:
        from transformers import AutoConfig

        values = real_config(self.fixture)
        values["text_config"] |= text_shrunken(len(self.media))
        values["vision_config"] = {
            "model_type": "dinov2_with_registers",
            "image_size": SIDE,
            "patch_size": PATCH,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_register_tokens": REGISTERS,
        }
        return AutoConfig.for_model(**(values | {"image_token_index": len(WORDS)}))

    def image_processor(self) -> Any:
        from transformers import BitImageProcessorPil

        return BitImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})

    def processor_settings(self) -> dict[str, Any]:
        """A stock model hands the registers on, so a stock processor has to make room for them."""
        return {
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1 + REGISTERS,
        }

    def everything(self) -> ZipConfig:
        return ZipConfig(dominant=TOKENS, contextual=0)

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        tower, layer = model.model.vision_tower, model.config.vision_feature_layer
        assert tower.config._attn_implementation == "eager"
        block, keys = tower.encoder.layer[layer].attention, []
        handle = block.k_proj.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
        output = tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
        handle.remove()
        image = [0, *range(1 + REGISTERS, TOKENS + REGISTERS)]  # CLS and patches
        tokens = []
        for i in range(len(inputs["pixel_values"])):
            hidden, row = output.hidden_states[layer][i, image], output.attentions[layer][i, :, 0].sum(0)[image]
            metric = keys[0][i, image].unflatten(-1, (4, -1)).mean(1)
            kept, _ = slow.compress(hidden, row, metric, *slow.budget(config, TOKENS), True)
            tokens.append(model.model.multi_modal_projector(kept))
        return {"image": tokens}

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found = model.model.get_image_features(
            inputs["pixel_values"], vision_feature_select_strategy="full"
        ).pooler_output
        return {"image": [torch.cat((tokens[:1], tokens[1 + REGISTERS :])) for tokens in found]}

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        return sum(slow.budget(config, TOKENS))


CASE = LlavaDinov2Case()
