"""What a loss is. A new one is a file of this folder, and `train.loss` in the config names it::

@LOSSES.register("focal")
@with_autograd
def focal(logits, targets):  # (T, V) float32, (T,) → the sum over T
    log_probs = -cross_entropy(logits, targets, reduction="none")
    return -((1 - log_probs.exp()) ** 2 * log_probs).sum()
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visionzip.registry import Registry

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(T, V)`` and targets ``(T,)`` → the loss summed over ``T`` in float32; the logits are overwritten with its gradient."""

LOSSES: Registry[Loss] = Registry("loss", "train.losses")
DEFAULT = "cross_entropy"


def with_autograd(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A differentiable function of float32 logits and targets, in the form of `LOSSES`: the gradient is autograd's."""

    def loss_(logits: Tensor, targets: Tensor) -> Tensor:
        exact = logits.detach().float().requires_grad_()
        with torch.enable_grad():
            total = function(exact, targets)
            (gradient,) = torch.autograd.grad(total, exact)
        logits.copy_(gradient)
        return total.detach()

    return loss_
