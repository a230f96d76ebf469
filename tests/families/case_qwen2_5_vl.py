"""Qwen2.5-VL: windows in most blocks of the encoder, a clock in the positions of a video."""

from __future__ import annotations

from typing import Any

from tests.families.case_qwen2_vl import Qwen2VLCase


class Qwen25VLCase(Qwen2VLCase):
    name = "Qwen2.5-VL"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    checkpoints = ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct")
    special = "as Qwen2-VL; scores of the last block, which has no windows"
    fixture = "qwen2_5_vl_7b"

    def vision(self) -> dict[str, Any]:
        small = {"hidden_size": 32, "intermediate_size": 64, "depth": 4, "num_heads": 4, "out_hidden_size": 48}
        return small | {"fullatt_block_indexes": [1, 3]}

    def processor_class(self) -> type:
        from transformers import Qwen2_5_VLProcessor

        return Qwen2_5_VLProcessor

    def step(self, model: Any, inputs: dict[str, Any], index: int) -> float:
        return model.config.vision_config.tokens_per_second * float(inputs["second_per_grid_ts"][index])


CASE = Qwen25VLCase()
