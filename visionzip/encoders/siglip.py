"""SigLIP's vision transformer (`SiglipVisionModel`): CLIP's layers without a CLS token and without a first norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visionzip.encoders.base import ENCODERS, attention_received, split_heads
from visionzip.encoders.clip import ClipEncoder


class SiglipEncoder(ClipEncoder):
    """Runs ``embeddings → layers[:k]``: bit-equal to ``hidden_states[k]``, which is not normalised, also at the last layer.

    Without a CLS token that attends to them, a token scores what it receives from all others (authors' code for SigLIP: mean over
    heads, mean over queries).
    """

    has_cls = False

    def embed(self, tower: Any, pixel_values: Tensor) -> Tensor:
        return tower.embeddings(pixel_values)

    def embed_resized(self, tower: Any, pixel_values: Tensor) -> Tensor:
        return tower.embeddings(pixel_values, interpolate_pos_encoding=True)

    def score(self, attention: Any, normed: Tensor, keys: Tensor) -> Tensor:
        return attention_received(split_heads(attention.q_proj(normed), attention.num_heads), keys, attention.scale)


ENCODERS.register("SiglipVisionModel")(SiglipEncoder())
