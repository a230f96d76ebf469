"""Qwen3-VL: Qwen2-VL with DeepStack, and a prompt that holds a video's frames apart.

Three earlier blocks of the encoder have mergers of their own, whose outputs are added to the first LLM layers' hidden states
at the visual tokens' places. They are pruned at the same places as the tokens: a dominant token gets its own, a contextual
token its target's. They are not merged: that would take all groups of all layers through all four mergers and make a
cached image four times as large, for what is a correction to a token that already holds the others' mean.

All four mergers map visual tokens into the LLM, so all four train.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor

from visionzip.families.base import FAMILIES, VisualTokens
from visionzip.families.mrope import GridOutput
from visionzip.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Its `outputs` also hold ``deepstack_features``."""

    deep_mergers: ClassVar[str] = "model.visual.deepstack_merger_list"
    projectors: ClassVar[tuple[str, ...]] = (*Qwen2VL.projectors, deep_mergers)
    frames_apart: ClassVar[bool] = True

    def outputs(self, visual_tokens: list[VisualTokens], kind: str = "image") -> GridOutput:
        found = super().outputs(visual_tokens, kind)
        given = cast(list[dict[str, Tensor]], visual_tokens)
        features: list[Any] = []
        for layer in range(len(self.model.model.visual.deepstack_merger_list)):
            merged = self._merge(f"{self.deep_mergers}.{layer}", [each["deep"][layer] for each in given])
            features.append([tokens.flatten(0, 1) for tokens in merged])
        found.deepstack_features = features
        return found


FAMILIES.register("qwen3_vl")(Qwen3VL)
