"""DINOv2's vision transformer (`Dinov2Model`), with and without registers: a CLS token, layer scale, interpolated positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionzip.encoders.base import ENCODERS, Encoder, Layer, attention_from_cls, run_blocks, split_heads
from visionzip.selectors import Features


class Dinov2Encoder(Encoder):
    """Runs ``embeddings → layer[:k]``: bit-equal to ``hidden_states[k]``, which is not normalised, also at the last layer.

    Its embeddings interpolate their positions to the size of the image, so images need not have the config's ``image_size``.

    Registers (Darcet et al., arXiv 2309.16588) stand between CLS and the patches: tokens that the encoder keeps notes in. They take
    part in its attention, so the CLS row is the softmax over all tokens, but they are no part of the image: what is read is CLS and
    patches alone.
    """

    has_cls = True

    def tokens(self, tower: Any) -> int:
        return tower.embeddings.patch_embeddings.num_patches + 1

    def depth(self, tower: Any) -> int:
        return len(tower.encoder.layer)

    def width(self, tower: Any) -> int:
        return max(part.out_features for part in tower.encoder.layer[0].mlp.children() if isinstance(part, nn.Linear))

    @torch.no_grad()
    def read(self, tower: Any, pixel_values: Tensor, layer: Layer, scores: bool) -> Features:
        reads = self.layers_run(tower, layer)
        tokens, block, block_input = run_blocks(tower.encoder.layer, tower.embeddings(pixel_values), reads)
        attention = block.attention
        normed = block.norm1(block_input)
        keys = split_heads(attention.k_proj(normed), attention.num_attention_heads)  # (B, H, N, d)
        found = None
        if scores:
            query = split_heads(attention.q_proj(normed[:, :1]), attention.num_attention_heads)
            found = self.without_registers(tower, attention_from_cls(query, keys, attention.scaling))
        return Features(
            self.without_registers(tower, tokens), self.without_registers(tower, keys.mean(dim=1)), found, has_cls=True
        )

    def read_resized(self, tower: Any, pixel_values: Tensor, layer: Layer, scores: bool) -> Features:
        return self.read(tower, pixel_values, layer, scores)

    def registers(self, tower: Any) -> int:
        return getattr(tower.config, "num_register_tokens", 0)

    def without_registers(self, tower: Any, tokens: Tensor) -> Tensor:
        """``(B, 1 + R + patches, …)`` → ``(B, 1 + patches, …)``."""
        registers = self.registers(tower)
        return torch.cat((tokens[:, :1], tokens[:, 1 + registers :]), dim=1) if registers else tokens


ENCODERS.register("Dinov2Model", "Dinov2WithRegistersModel")(Dinov2Encoder())
