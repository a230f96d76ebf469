"""Where the loss is taken: labels ``(B, L)`` are token ids, and `IGNORE` where nothing is supervised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from data.template import IGNORE

__all__ = ["IGNORE", "count_supervised", "mask_predicting", "predicted_tokens"]


def mask_predicting(labels: Tensor) -> Tensor:
    """``(B, L)`` labels → mask of the places whose *next* token has a label. The last place predicts nothing."""
    return functional.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)


def count_supervised(labels: Tensor) -> int:
    """How many tokens of ``(B, L)`` labels are predicted; the first of a row never is."""
    return int(torch.count_nonzero(labels[:, 1:] != IGNORE))


def predicted_tokens(labels: Tensor) -> Tensor:
    """``(L,)`` labels → the tokens ``(S,)`` that are predicted, in order."""
    return labels[1:][labels[1:] != IGNORE]
