"""LLaVA-NeXT-Video (`LlavaNextVideoForConditionalGeneration`): images as LLaVA-NeXT, videos frame by frame.

Images are tiles in the order of LLaVA-NeXT. Of a frame the untouched model pools the 24 × 24 patches to 12 × 12 *before* the
projector, which is where we choose: among the pooled patches, with scores and keys pooled over the same squares, so that what
is kept is what the untouched model would show its LLM. A frame's CLS token is kept as well and counts among the dominant, as
everywhere with CLIP (the untouched model drops it). A frame's budget is of 145 tokens, an image's tile's of 577.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.compress import compress_to_budget
from visionzip.config import ZipConfig
from visionzip.families.base import FAMILIES, VisualTokens
from visionzip.families.llava_next import LlavaNext
from visionzip.families.stand_ins import TokenCount
from visionzip.families.video import FrameCount, frame_budget
from visionzip.selectors import Features


class LlavaNextVideo(LlavaNext):
    """Images and videos: ``(L, D)``, a video's frames one after the other with ``K`` tokens each."""

    per_image_budgets = False
    inputs: ClassVar[dict[str, tuple[str, ...]]] = {**LlavaNext.inputs, "video": ("pixel_values_videos",)}

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        found: list[VisualTokens] = []
        if image_inputs.get("pixel_values") is not None:
            found += super().compress(config, **image_inputs)
        if image_inputs.get("pixel_values_videos") is not None:
            with torch.no_grad():
                found += [self._video(config, frames) for frames in image_inputs["pixel_values_videos"]]
        return found

    def _video(self, config: ZipConfig, frames: Tensor) -> Tensor:
        features = self.encode(config, frames)
        kept = compress_to_budget(pooled(features, self.model.model.vision_resampler, self.stride), config)
        return kept.tokens.flatten(0, 1)

    @property
    def stride(self) -> int:
        return self.model.config.spatial_pool_stride

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame after pooling, without CLS."""
        return (self.side // self.stride) ** 2

    def frame_budget(self, config: ZipConfig) -> tuple[int, int]:
        """``(dominant, contextual)`` of one frame."""
        cls = int(self.encoder.has_cls)
        return frame_budget(config, self.frame_tokens + cls, cls)

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        return {
            **super().processor_facts(processor),
            "video token id": (getattr(processor, "video_token_id", None), self.model.config.video_token_id),
        }

    def placeholder_counts(self, config: ZipConfig) -> dict[str, TokenCount]:
        return {**super().placeholder_counts(config), "video": FrameCount(sum(self.frame_budget(config)))}

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        found = []
        if image_inputs.get("pixel_values") is not None:
            found += super().token_counts(config, **image_inputs)
        for frames in image_inputs.get("pixel_values_videos", ()):
            found.append((len(frames) * self.frame_tokens, len(frames) * sum(self.frame_budget(config))))
        return found


FAMILIES.register("llava_next_video")(LlavaNextVideo)


def pooled(features: Features, resampler: Any, stride: int) -> Features:
    """``(F, 1 + N, D)`` → ``(F, 1 + N / stride², D)``: CLS as it is, patches through the model's own pooling.

    Scores and keys are averaged over the same squares, whatever the mode of the pooling.
    """
    cls = features.cls

    def average(values: Tensor) -> Tensor:  # (F, 1 + N, d)
        patches = values[:, cls:]
        side = int(patches.shape[1] ** 0.5)
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        return torch.cat((values[:, :cls], F.avg_pool2d(grid, stride).flatten(2).transpose(1, 2)), dim=1)

    hidden = features.hidden_states
    scores = None if features.scores is None else average(features.scores.unsqueeze(-1)).squeeze(-1)
    return Features(
        torch.cat((hidden[:, :cls], resampler(hidden[:, cls:])), dim=1),
        average(features.metric),
        scores,
        features.has_cls,
    )
