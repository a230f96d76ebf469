"""Video-LLaVA (`VideoLlavaForConditionalGeneration`): 16 × 16 patches of each frame, and of images.

Its two LanguageBind encoders are held by transformers as CLIP models, one for images and one for frames, which sees each
frame on its own; each is compressed on its own, as in the paper (8 frames × 17 tokens = 136 instead of 2048). transformers'
class keeps the CLS token of every frame (257 × 8 = 2056 placeholders) and drops an image's; we keep and count both.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.compress import compress_to_budget
from visionzip.config import ZipConfig
from visionzip.encoders import encoder_for
from visionzip.families.base import FAMILIES, VisualTokens
from visionzip.families.llava import Llava
from visionzip.families.stand_ins import TokenCount
from visionzip.families.video import FrameCount, stacked


class VideoLlava(Llava):
    """Images: ``(K, D)``; videos: ``(F * K, D)``, frame after frame."""

    per_image_budgets = False
    controls = False
    places = False
    inputs: ClassVar[dict[str, tuple[str, ...]]] = {
        "image": ("pixel_values", "pixel_values_images"),  # the processor's name is an older one
        "video": ("pixel_values_videos",),
    }

    tower: ClassVar[str] = "model.image_tower"
    video_tower: ClassVar[str] = "model.video_tower"
    frozen: ClassVar[dict[str, str]] = {"encoder": tower, "llm": Llava.llm, "video encoder": video_tower}

    def check(self, config: ZipConfig) -> None:
        super().check(config)
        encoder_for(self.model.get_submodule(self.video_tower))

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        found: list[VisualTokens] = []
        with torch.no_grad():
            images = images_of(image_inputs)
            if images is not None:
                found += list(compress_to_budget(self.encode(config, images), config).tokens)
            if image_inputs.get("pixel_values_videos") is not None:
                for frames in image_inputs["pixel_values_videos"]:
                    features = self.encode(config, frames, self.model.get_submodule(self.video_tower))
                    found.append(compress_to_budget(features, config).tokens.flatten(0, 1))
        return found

    def encoder_output(self, embeddings: list[Tensor], kind: str = "image") -> BaseModelOutputWithPooling:
        return stacked(embeddings)

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        return {
            **super().processor_facts(processor),
            "video token id": (getattr(processor, "video_token_id", None), self.model.config.video_token_id),
        }

    def placeholder_counts(self, config: ZipConfig) -> dict[str, TokenCount]:
        return {**super().placeholder_counts(config), "video": FrameCount(sum(self.budget(config)))}

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        images = images_of(image_inputs)
        stock, budget = super().stock_count(), sum(self.budget(config))
        assert stock is not None
        found = [(stock, budget)] * (0 if images is None else len(images))
        whole = self.encoder.tokens(self.model.get_submodule(self.video_tower))
        videos = image_inputs.get("pixel_values_videos", ())
        return found + [(len(frames) * whole, len(frames) * budget) for frames in videos]

    def stock_count(self) -> int | None:
        return None  # an image's and a video's differ, and prompts may hold both


FAMILIES.register("video_llava")(VideoLlava)


def images_of(image_inputs: dict[str, Any]) -> Tensor | None:
    """The images, under the name of the model's ``forward`` or the older one its processor gives."""
    found = image_inputs.get("pixel_values")
    return found if found is not None else image_inputs.get("pixel_values_images")
