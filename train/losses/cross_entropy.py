"""`cross_entropy`: with its gradient in place of the logits, so that no second tensor of their size is made."""

from __future__ import annotations

from torch import Tensor

from train.losses.base import LOSSES


@LOSSES.register("cross_entropy")
def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed loss of ``(T, V)`` logits, which are overwritten with its gradient. Float32 inside whatever their type."""
    exact = logits.float()  # the same tensor where it is float32 already
    right = exact.gather(1, targets[:, None])
    total = exact.logsumexp(dim=1, keepdim=True)
    loss = (total - right).sum()
    exact.sub_(total).exp_()
    exact.scatter_add_(1, targets[:, None], exact.new_full((len(targets), 1), -1.0))
    if exact is not logits:
        logits.copy_(exact)
    return loss
