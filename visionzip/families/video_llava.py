"""Video-LLaVA (`VideoLlavaForConditionalGeneration`): 16 × 16 patches of each frame, and of pictures.

Its two LanguageBind encoders are held by transformers as CLIP models, one for pictures and one for frames, which sees each
frame on its own; each is compressed on its own, as in the paper (8 frames × 17 tokens = 136 instead of 2048). transformers'
class keeps the CLS token of every frame (257 × 8 = 2056 placeholders) and drops a picture's; we keep and count both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.config import ZipConfig
from visionzip.encoders import encoder_for
from visionzip.families.base import FAMILIES, ImageFeatures, VideoFeatures, VisualTokens, select
from visionzip.families.llava import FixedPlaceholders, Llava
from visionzip.families.video import CountPicturesAndVideos, FramePlaceholders, stacked


@dataclass
class VideoLlavaImages(ImageFeatures):
    """The processor's name for pictures is an older one, which ``generate`` must find in the signature."""

    def __call__(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        pixel_values_images: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        inputs = {"pixel_values": pixel_values, "pixel_values_images": pixel_values_images}
        return self.features("image", vision_feature_layer, inputs)


class VideoLlava(Llava):
    """Pictures: ``(K, D)``; videos: ``(F * K, D)``, frame after frame."""

    per_image_budgets = False

    tower: ClassVar[str] = "model.image_tower"
    video_tower: ClassVar[str] = "model.video_tower"
    frozen: ClassVar[dict[str, str]] = {"encoder": tower, "llm": Llava.llm, "video encoder": video_tower}

    def check(self, config: ZipConfig) -> None:
        super().check(config)
        encoder_for(self.model.get_submodule(self.video_tower))

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        found: list[VisualTokens] = []
        layer = self.layer(config)
        with torch.no_grad():
            pictures = pictures_of(image_inputs)
            if pictures is not None:
                tower = self.model.get_submodule(self.tower)
                found += list(select(encoder_for(tower), tower, pictures, layer, config).tokens)
            if image_inputs.get("pixel_values_videos") is not None:
                tower = self.model.get_submodule(self.video_tower)
                for frames in image_inputs["pixel_values_videos"]:
                    found.append(select(encoder_for(tower), tower, frames, layer, config).tokens.flatten(0, 1))
        return found

    def encoder_output(self, embeddings: list[Tensor], kind: str = "image") -> BaseModelOutputWithPooling:
        return stacked(embeddings)

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        return {
            **super().processor_facts(processor),
            "video token id": (getattr(processor, "video_token_id", None), self.model.config.video_token_id),
        }

    def patches(self, processor: Any, config: ZipConfig) -> list[tuple[object, str, object]]:
        changes: list[tuple[object, str, object]] = [
            (self.model.model, "get_image_features", VideoLlavaImages(self, config)),
            (self.model.model, "get_video_features", VideoFeatures(self, config)),
        ]
        if processor is not None:
            budget = sum(self.budget(config))
            videos = FramePlaceholders(processor.video_token, budget)
            changes.append((processor, "replace_image_token", FixedPlaceholders(processor.image_token, budget)))
            changes.append((processor, "replace_video_token", videos))
            changes.append((processor, "_get_num_multimodal_tokens", CountPicturesAndVideos(budget, videos)))
        return changes

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        pictures = pictures_of(image_inputs)
        stock, budget = super().stock_count(), sum(self.budget(config))
        assert stock is not None
        found = [(stock, budget)] * (0 if pictures is None else len(pictures))
        whole = self.encoder.tokens(self.model.get_submodule(self.video_tower))
        videos = image_inputs.get("pixel_values_videos", ())
        return found + [(len(frames) * whole, len(frames) * budget) for frames in videos]

    def stock_count(self) -> int | None:
        return None  # a picture's and a video's differ, and prompts may hold both


FAMILIES.register("video_llava")(VideoLlava)


def pictures_of(image_inputs: dict[str, Any]) -> Tensor | None:
    """The pictures, under the name of the model's ``forward`` or the older one its processor gives."""
    found = image_inputs.get("pixel_values")
    return found if found is not None else image_inputs.get("pixel_values_images")
