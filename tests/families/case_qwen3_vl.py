"""Qwen3-VL: DeepStack, and timestamps between the frames of a video."""

from __future__ import annotations

from typing import Any

from tests.families.case_qwen2_vl import Qwen2VLCase


class Qwen3VLCase(Qwen2VLCase):
    name = "Qwen3-VL"
    model_class = "Qwen3VLForConditionalGeneration"
    checkpoints = ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-2B-Instruct")
    special = "as Qwen2-VL; DeepStack features pruned at the same places, their mergers are trained too"
    fixture = "qwen3_vl_8b"
    frames_apart = True
    video_text = "<|video_pad|>"  # the processor puts start and end around each frame

    def vision(self) -> dict[str, Any]:
        small = {"hidden_size": 32, "intermediate_size": 64, "depth": 5, "num_heads": 4, "out_hidden_size": 48}
        return small | {"deepstack_visual_indexes": [1, 2, 3]}

    def config(self) -> Any:
        config = super().config()
        config.text_config.num_hidden_layers = 4  # one a DeepStack layer, and one that sees what the last of them did
        return config

    def processor_class(self) -> type:
        from transformers import Qwen3VLProcessor

        return Qwen3VLProcessor


CASE = Qwen3VLCase()
