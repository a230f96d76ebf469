"""Gemma 3 (`Gemma3ForConditionalGeneration`): SigLIP at 896 pixels, 4 × 4 patches pooled to 256 tokens per image.

Selection stands after the pooling (`visionzip.families.grouped` says why). Pooling is the first thing the projector module does;
it has no weights. So `compress` pools and chooses, and `project` hands the chosen tokens to the *whole* module, laid out
such that its pooling gives each of them back. Calling its norm and matrix on their own would be less work, but then
ZeRO-3, FSDP, PEFT and device maps, which act when a module is called, would not see it.

Pan-and-scan crops are images of their own. An image's tokens attend to each other in both directions, told by
``token_type_ids``, which the processor makes from the ids and which therefore stays right. Batches that come without, as those
of a template of ours, get theirs: the untouched model would let images attend causally, which it was not trained on.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.config import ZipConfig
from visionzip.families.base import FAMILIES, Hook, VisualTokens, dtype_of
from visionzip.families.grouped import Grouped
from visionzip.families.stand_ins import TokenTypes


class Gemma3(Grouped):
    """``C = D``: the mean of a group."""

    @property
    def side(self) -> int:
        return self.model.model.multi_modal_projector.kernel_size

    def join(self, tokens: Tensor) -> Tensor:
        length, side = round(tokens.shape[1] ** 0.5), self.side
        square = tokens.transpose(1, 2).unflatten(2, (length, length)).contiguous()
        return F.avg_pool2d(square, kernel_size=side, stride=side).flatten(2).transpose(1, 2)

    def token(self, processor: Any) -> tuple[str, int]:
        return (
            processor.tokenizer.image_token,
            processor.tokenizer.image_token_id,
        )  # its own image_token begins an image

    def token_types(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | None:
        """1 for visual tokens, 0 for text."""
        return (input_ids == self.image_token_id).long()

    def hooks(self, config: ZipConfig) -> list[Hook]:
        return [(self.model, TokenTypes(self))]

    def project(self, visual_tokens: list[VisualTokens]) -> list[Tensor]:
        projector = self.model.model.multi_modal_projector
        lengths = [len(tokens) for tokens in visual_tokens]
        tokens = torch.cat(cast(list[Tensor], visual_tokens))
        sheets = unpool(tokens.to(dtype_of(projector, tokens.dtype)), projector.tokens_per_side, projector.kernel_size)
        return list(projector(sheets).flatten(0, 1)[: len(tokens)].split(lengths))


def unpool(tokens: Tensor, length: int, side: int) -> Tensor:
    """``(M, D)`` → ``(sheets, N, D)``, images of patches whose mean over blocks of ``side × side`` is `tokens` again.

    A token stands ``side²`` times as large in one corner of its block, among zeros: where ``side²`` is a power of two
    (16 in all of Gemma 3), nothing is rounded, which a block of equal values does not promise.
    """
    count = length * length
    sheets = F.pad(tokens, (0, 0, 0, -len(tokens) % count)).unflatten(0, (-1, length, length))
    spread = tokens.new_zeros(*sheets.shape[:2], side, length, side, tokens.shape[-1])
    spread[:, :, 0, :, 0] = sheets * side**2
    return spread.flatten(3, 4).flatten(1, 3)


FAMILIES.register("gemma3")(Gemma3)
