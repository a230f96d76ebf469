"""Video-LLaVA: frames and images of 16 × 16 patches, each kind with an encoder of its own."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import slow
from tests.families.case import PilVideos, tokenizer, with_pil_videos
from tests.families.case_llava import LlavaCase
from visionzip import ZipConfig


class VideoLlavaCase(LlavaCase):
    name = "Video-LLaVA"
    model_class = "VideoLlavaForConditionalGeneration"
    checkpoints = ("LanguageBind/Video-LLaVA-7B-hf",)
    special = "budget per frame; CLS of each frame kept, as in transformers' class"
    fixture = "video_llava_7b"
    media = ("<image>", "<video>")
    frames = 8
    budget = ZipConfig(dominant=14, contextual=3)  # 8 frames × 17 = 136, as in the paper
    needs_torchvision = True
    exempt = {}  # noqa: RUF012

    def processor(self) -> Any:
        from transformers import CLIPImageProcessorPil, VideoLlavaProcessor

        side = {"height": 224, "width": 224}
        videos = PilVideos(CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=side))
        return with_pil_videos(
            VideoLlavaProcessor, self.image_processor(), tokenizer(*self.media), videos, **self.processor_settings()
        )

    def image_processor(self) -> Any:
        from transformers import VideoLlavaImageProcessor

        return VideoLlavaImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})

    def everything(self) -> ZipConfig:
        return ZipConfig(dominant=257, contextual=0)

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        layer, budget = model.config.vision_feature_layer, slow.budget(config, 257)
        if "pixel_values_images" in inputs:
            kept = slow.clip_tiles(model.model.image_tower, inputs["pixel_values_images"], layer, *budget)
            found["image"] = [model.model.multi_modal_projector(tokens) for tokens, _ in kept]
        for frames in inputs.get("pixel_values_videos", ()):
            kept = slow.clip_tiles(model.model.video_tower, frames, layer, *budget)
            tokens = torch.cat([tokens for tokens, _ in kept])
            found.setdefault("video", []).append(model.model.multi_modal_projector(tokens))
        return found

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        if "pixel_values_images" in inputs:
            images = inputs["pixel_values_images"]
            stock = model.model.get_image_features(images, vision_feature_select_strategy="full")
            found["image"] = list(stock.pooler_output)
        for frames in inputs.get("pixel_values_videos", ()):
            found.setdefault("video", []).append(
                model.model.get_video_features(frames[None]).pooler_output.flatten(0, 1)
            )
        return found

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        return sum(slow.budget(config, 257))

    def video_count(self, config: ZipConfig, frames: int) -> int:
        return frames * sum(slow.budget(config, 257))


CASE = VideoLlavaCase()
