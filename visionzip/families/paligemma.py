"""PaliGemma 1 and 2 (`PaliGemmaForConditionalGeneration`): SigLIP, a single linear layer, no grouping.

The simplest of all: 256, 1024 or 4096 patches (224, 448, 896 pixels), each a token, ``K`` of them kept before the projector.
Positions count what is there, so a compressed picture takes ``K`` of them.

The prompt (prefix) attends in both directions, the answer (suffix) causally, told by ``token_type_ids``. Batches that come without,
as those of a template of ours, get theirs from the labels: all before the first supervised token is prefix. Later questions of a
conversation are suffix with the answers: as prefix they would see an earlier answer and be seen by its own prompt.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from visionzip.config import ZipConfig
from visionzip.families.base import FAMILIES
from visionzip.families.grouped import Grouped


class PaliGemma(Grouped):
    """``C = D``."""

    @property
    def side(self) -> int:
        return 1

    def join(self, tokens: Tensor) -> Tensor:
        return tokens

    def hooks(self, config: ZipConfig) -> list[RemovableHandle]:
        return [self.model.register_forward_pre_hook(token_types, with_kwargs=True)]


def token_types(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Pre-hook of ``forward``: 0 for the prefix, 1 from the first supervised token on, where nothing is said."""
    labels = kwargs.get("labels")
    if args or labels is None or kwargs.get("token_type_ids") is not None:
        return None
    return args, {**kwargs, "token_type_ids": ((labels != -100).cumsum(dim=1) > 0).long()}


FAMILIES.register("paligemma")(PaliGemma)
