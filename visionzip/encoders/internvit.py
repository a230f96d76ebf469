"""InternVL's vision transformer (`InternVLVisionModel`): a CLS token that its VLM drops, layer scale, optional q/k norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visionzip.encoders.base import ENCODERS, Encoder, Layer, attention_received, run_blocks, split_heads
from visionzip.selectors import Features


class InternVitEncoder(Encoder):
    """Runs ``embeddings → layer[:k]``: bit-equal to ``hidden_states[k]``.

    A token scores what it receives from all others, not what CLS gives it. InternVL reads the last layer and drops CLS, so
    nothing the VLM was trained on ever came back to CLS's query there: its row of the map is a leftover of pretraining, while
    the patches' rows are what the LLM's loss shaped.
    """

    has_cls = True

    def tokens(self, tower: Any) -> int:
        return tower.embeddings.patch_embeddings.num_patches + 1

    def depth(self, tower: Any) -> int:
        return len(tower.encoder.layer)

    @torch.no_grad()
    def read(self, tower: Any, pixel_values: Tensor, layer: Layer, scores: bool) -> Features:
        reads = self.layers_run(tower, layer)
        tokens, block, block_input = run_blocks(tower.encoder.layer, tower.embeddings(pixel_values), reads)
        attention = block.attention
        normed = block.layernorm_before(block_input)
        keys = split_heads(attention.k_norm(attention.k_proj(normed)), attention.num_heads)  # (B, H, N, d)
        found = None
        if scores:
            queries = split_heads(attention.q_norm(attention.q_proj(normed)), attention.num_heads)
            found = attention_received(queries, keys, attention.scale)
        return Features(tokens, keys.mean(dim=1), found, has_cls=True)


ENCODERS.register("InternVLVisionModel")(InternVitEncoder())
