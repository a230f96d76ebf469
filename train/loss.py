"""The loss where there is a label, and nowhere else: one of `train.losses`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.labels import mask_predicting
from train.layout import Layout, PaddedRows
from train.losses import DEFAULT, LOSSES, Loss
from visionzip.attach import unwrap
from visionzip.intercept import Interceptions

CHUNK_BYTES = 64 << 20
"""Of float32 logits at once. More would only take memory: with a vocabulary of 32,000 this is 500 rows, enough for an efficient
matrix product."""

PADDED = PaddedRows()

# What a text config calls an operation between head and loss; with one, logits are taken from the model itself.
_AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def summed_loss(
    model: nn.Module,
    head: nn.Module,
    inputs: dict[str, Any],
    labels: Tensor,
    layout: Layout = PADDED,
    loss: Loss | None = None,
) -> Tensor:
    """The loss in float32, summed over the supervised tokens of this batch; 0 with a gradient of 0 where there are none.

    Args:
        layout: how the collated samples are laid out for the forward.
        loss: one of `LOSSES`; None: cross-entropy.
    """
    with layout.lay_out(inputs, labels) as (laid_out, targets):
        return loss_of_rows(model, head, laid_out, targets, loss)


def loss_of_rows(
    model: nn.Module, head: nn.Module, inputs: dict[str, Any], labels: Tensor, loss: Loss | None
) -> Tensor:
    """`summed_loss` of inputs that are laid out already."""
    keep = mask_predicting(labels)
    targets = labels[:, 1:][keep[:, :-1]]
    if not can_fuse(model, head):
        with rows_of_head(head, keep):
            logits = model(**inputs, use_cache=False).logits  # (supervised tokens, vocabulary)
        return LogitsLoss.apply(logits, targets.to(logits.device), loss)
    with rows_of_head(head, keep, withhold=True) as taken:
        model(**inputs, use_cache=False)
    rows = taken[0]
    return FrozenHeadLoss.apply(rows, head.weight, targets.to(rows.device), loss)


def can_fuse(model: nn.Module, head: nn.Module) -> bool:
    """Whether the head is nothing but a frozen matrix, whole on this rank, and its product is what the loss is taken of.

    `model` may be wrapped: DDP has no ``config``, and DeepSpeed's engine another one.
    """
    config = getattr(unwrap(model), "config", None)
    texts = [config, getattr(config, "text_config", None)]
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and not hasattr(head.weight, "ds_id")
        and not any(getattr(text, name, None) for text in texts for name in _AFTER_HEAD)
    )


@contextmanager
def rows_of_head(head: nn.Module, keep: Tensor, withhold: bool = False) -> Iterator[list[Tensor]]:
    """Inside, `head` (``lm_head``) sees only the rows of its ``(B, L, D)`` input where `keep` ``(B, L)`` is true.

    The model's own ``logits_to_keep`` picks columns: one mask for all rows of the batch. Answers stand at different places in
    each row, so that would still compute most of the logits.

    With `withhold` the head sees none at all (its product is empty) and the rows ``(kept, D)`` are put into the yielded list.
    """
    taken: list[Tensor] = []

    def select(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = args[0][keep.to(args[0].device)]
        if not withhold:
            return (rows, *args[1:]), kwargs
        taken.append(rows)
        return (rows[:0], *args[1:]), kwargs

    with Interceptions() as put:
        put.before_forward(head, select)
        yield taken


class FrozenHeadLoss(torch.autograd.Function):
    """Frozen head and loss in one, in chunks: rows ``(T, D)``, weight ``(V, D)``, targets ``(T,)`` → the sum.

    Logits exist for one chunk at a time. The gradient of the rows is made on the way, while they are there (Hsu et al. 2024,
    "Liger Kernel", section 3.2), so nothing of size V is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss: Loss | None = None,
    ) -> Tensor:
        chosen = loss or LOSSES[DEFAULT]
        size = max(1, CHUNK_BYTES // (4 * len(weight)))
        weight = weight.to(rows.dtype)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = rows[part] @ weight.t()
            total += chosen(logits, targets[part])
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above.to(gradient.dtype), None, None, None


class LogitsLoss(torch.autograd.Function):
    """Loss of logits ``(T, V)``, summed. The gradient is written over the logits; float32 copies are of a chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, loss: Loss | None = None) -> Tensor:
        chosen = loss or LOSSES[DEFAULT]
        size = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        own = logits.detach() if ctx.needs_input_grad[0] else logits.detach().clone()
        for start in range(0, len(own), size):
            part = slice(start, start + size)
            total += chosen(own[part], targets[part])
        ctx.save_for_backward(own)
        return total

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above.to(gradient.dtype), None, None
