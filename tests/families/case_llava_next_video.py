"""LLaVA-NeXT-Video: images as LLaVA-NeXT, frames pooled from 24 × 24 to 12 × 12 patches."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import slow
from tests.families.case import PilVideos, tokenizer, with_pil_videos
from tests.families.case_llava_next import SIDE, LlavaNextCase
from visionzip import ZipConfig


def squares(values: torch.Tensor) -> torch.Tensor:
    """(576, d) → (144, d): the mean of each 2 × 2 patches, one by one."""
    grid = values.unflatten(0, (SIDE, SIDE))
    rows = [
        grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(0, 1).mean(0)
        for row in range(SIDE // 2)
        for column in range(SIDE // 2)
    ]
    return torch.stack(rows)


class LlavaNextVideoCase(LlavaNextCase):
    name = "LLaVA-NeXT-Video"
    model_class = "LlavaNextVideoForConditionalGeneration"
    checkpoints = (
        "llava-hf/LLaVA-NeXT-Video-7B-hf",
        "llava-hf/LLaVA-NeXT-Video-7B-DPO-hf",
        "llava-hf/LLaVA-NeXT-Video-34B-hf",
    )
    special = "budget per frame, after pooling; CLS of each frame kept"
    fixture = "llava_next_video_7b"
    media = ("<image>", "<video>")
    frames = 3
    needs_torchvision = True
    exempt = {}  # noqa: RUF012

    def processor(self) -> Any:
        from transformers import CLIPImageProcessorPil, LlavaNextVideoProcessor

        side = {"height": 336, "width": 336}
        videos = PilVideos(CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side))
        return with_pil_videos(
            LlavaNextVideoProcessor, self.image_processor(), tokenizer(*self.media), videos, **self.processor_settings()
        )

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found = super().reference(model, config, inputs) if "pixel_values" in inputs else {}
        for frames in inputs.get("pixel_values_videos", ()):
            hidden, maps, keys = slow.encode(model.model.vision_tower, frames, model.config.vision_feature_layer)
            tokens = []
            for frame in range(len(frames)):
                scores, metric = maps[frame, :, 0].sum(0).unsqueeze(-1), keys[frame].unflatten(-1, (4, -1)).mean(1)
                whole = [torch.cat([values[:1], squares(values[1:])]) for values in (hidden[frame], scores, metric)]
                budget = slow.budget(config, 145)
                tokens.append(slow.compress(whole[0], whole[1].squeeze(-1), whole[2], *budget, True)[0])
            found.setdefault("video", []).append(model.model.multi_modal_projector(torch.cat(tokens)))
        return found

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found = super().uncompressed(model, inputs) if "pixel_values" in inputs else {}
        for frames in inputs.get("pixel_values_videos", ()):
            output = model.model.vision_tower(frames, output_hidden_states=True)
            cls = model.model.multi_modal_projector(output.hidden_states[model.config.vision_feature_layer][:, :1])
            stock = model.model.get_video_features(frames[None]).pooler_output[0].unflatten(0, (len(frames), 144))
            found.setdefault("video", []).append(torch.cat([cls, stock], dim=1).flatten(0, 1))
        return found

    def everything(self) -> ZipConfig:
        return ZipConfig(dominant=1.0, contextual=0)  # an image's tile has 577, a frame 145

    def video_count(self, config: ZipConfig, frames: int) -> int:
        return frames * sum(slow.budget(config, 145))


CASE = LlavaNextVideoCase()
