"""CLIP's vision transformer (`CLIPVisionModel`): a CLS token, pre-norm layers, learned positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visionzip.encoders.base import ENCODERS, Encoder, Layer, attention_from_cls, run_blocks, split_heads
from visionzip.selectors import Features


class ClipEncoder(Encoder):
    """Runs ``embeddings → pre_layrnorm → layers[:k]`` and reads layer k: bit-equal to ``hidden_states[k]``.

    The layer's queries and keys are taken by calling its own ``q_proj`` and ``k_proj`` on its own normalised input: one
    extra key projection (0.35 % of a 24-layer encoder) rather than a hook, which would break full-graph compilation, or a
    second version of the layer. Attention stays with whatever implementation the model was loaded with.
    """

    has_cls = True

    def tokens(self, tower: Any) -> int:
        return tower.embeddings.num_positions

    def depth(self, tower: Any) -> int:
        return len(tower.encoder.layers)

    @torch.no_grad()
    def read(self, tower: Any, pixel_values: Tensor, layer: Layer, scores: bool, *, resized: bool = False) -> Features:
        reads = self.layers_run(tower, layer)
        embedded = (self.embed_resized if resized else self.embed)(tower, pixel_values)
        tokens, block, block_input = run_blocks(tower.encoder.layers, embedded, reads, None)
        attention = block.self_attn
        normed = block.layer_norm1(block_input)
        keys = split_heads(attention.k_proj(normed), attention.num_heads)  # (B, H, N, d)
        found = self.score(attention, normed, keys) if scores else None
        return Features(tokens, keys.mean(dim=1), found, has_cls=self.has_cls)

    def read_resized(self, tower: Any, pixel_values: Tensor, layer: Layer, scores: bool) -> Features:
        return self.read(tower, pixel_values, layer, scores, resized=True)

    def embed(self, tower: Any, pixel_values: Tensor) -> Tensor:
        """``(B, 3, height, width)`` → ``(B, N, D)``, what the first layer takes."""
        return tower.pre_layrnorm(tower.embeddings(pixel_values))

    def embed_resized(self, tower: Any, pixel_values: Tensor) -> Tensor:
        """`embed` for images of another size: positions are interpolated."""
        return tower.pre_layrnorm(tower.embeddings(pixel_values, interpolate_pos_encoding=True))

    def score(self, attention: Any, normed: Tensor, keys: Tensor) -> Tensor:
        """``(B, N)``: what CLS attends to. `normed` ``(B, N, D)`` is the layer's input, `keys` ``(B, H, N, d)``."""
        query = split_heads(attention.q_proj(normed[:, :1]), attention.num_heads)
        return attention_from_cls(query, keys, attention.scale)


ENCODERS.register("CLIPVisionModel")(ClipEncoder())
