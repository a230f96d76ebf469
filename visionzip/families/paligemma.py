"""PaliGemma 1 and 2 (`PaliGemmaForConditionalGeneration`): SigLIP, a single linear layer, no grouping.

The simplest of all: 256, 1024 or 4096 patches (224, 448, 896 pixels), each a token, ``K`` of them kept before the projector.
Positions count what is there, so a compressed image takes ``K`` of them.

The prompt (prefix) attends in both directions, the answer (suffix) causally, told by ``token_type_ids``. Batches that come without,
as those of a template of ours, get theirs from the labels: all before the first supervised token is prefix. Later questions of a
conversation are suffix with the answers: as prefix they would see an earlier answer and be seen by its own prompt.
"""

from __future__ import annotations

from torch import Tensor

from visionzip.config import ZipConfig
from visionzip.families.base import FAMILIES, Hook
from visionzip.families.grouped import Grouped
from visionzip.families.stand_ins import TokenTypes


class PaliGemma(Grouped):
    """``C = D``."""

    @property
    def side(self) -> int:
        return 1

    def join(self, tokens: Tensor) -> Tensor:
        return tokens

    def token_types(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | None:
        """0 for the prefix, 1 from the first supervised token on."""
        return None if labels is None else ((labels != -100).cumsum(dim=1) > 0).long()

    def hooks(self, config: ZipConfig) -> list[Hook]:
        return [(self.model, TokenTypes(self))]


FAMILIES.register("paligemma")(PaliGemma)
