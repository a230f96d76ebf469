"""Qwen3-VL: Qwen2-VL with DeepStack, and a prompt that holds a video's frames apart.

Three earlier blocks of the encoder have mergers of their own, whose outputs are added to the first LLM layers' hidden states
at the visual tokens' places. They are pruned at the same places as the tokens: a dominant token gets its own, a contextual
token its target's. They are not merged: that would take all groups of all layers through all four mergers and make a
cached picture four times as large, for what is a correction to a token that already holds the others' mean.

All four mergers map visual tokens into the LLM, so all four train.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor
from transformers import PreTrainedModel

from visionzip.families.base import FAMILIES, Picture
from visionzip.families.mrope import VisualTokens
from visionzip.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Its `outputs` also hold ``deepstack_features``."""

    deep_mergers: ClassVar[str] = "model.visual.deepstack_merger_list"
    frames_apart: ClassVar[bool] = True

    @property
    def projectors(self) -> tuple[str, ...]:
        return (self.projector, self.deep_mergers)

    def outputs(self, model: PreTrainedModel, pictures: list[Picture], kind: str = "image") -> VisualTokens:
        found = super().outputs(model, pictures, kind)
        given = cast(list[dict[str, Tensor]], pictures)
        features: list[Any] = []
        for layer in range(len(cast(Any, model).model.visual.deepstack_merger_list)):
            merged = self._merge(model, f"{self.deep_mergers}.{layer}", [picture["deep"][layer] for picture in given])
            features.append([tokens.flatten(0, 1) for tokens in merged])
        found.deepstack_features = features
        return found


FAMILIES.register("qwen3_vl")(Qwen3VL())
