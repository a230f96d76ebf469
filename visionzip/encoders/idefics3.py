"""Idefics3's and SmolVLM's vision transformers: SigLIP's layers after embeddings that accept images of any shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visionzip.encoders.base import ENCODERS
from visionzip.encoders.siglip import SiglipEncoder


class Idefics3Encoder(SiglipEncoder):
    """Their processors only ever make square tiles without padding, so no patch is masked here."""

    def embed(self, tower: Any, pixel_values: Tensor) -> Tensor:
        rows, columns = (side // tower.patch_size for side in pixel_values.shape[2:])
        whole = torch.ones(pixel_values.shape[0], rows, columns, dtype=torch.bool, device=pixel_values.device)
        dtype = tower.embeddings.patch_embedding.weight.dtype  # other encoders' embeddings cast by themselves
        return tower.embeddings(pixel_values=pixel_values.to(dtype), patch_attention_mask=whole)


ENCODERS.register("Idefics3VisionTransformer", "SmolVLMVisionTransformer")(Idefics3Encoder())
