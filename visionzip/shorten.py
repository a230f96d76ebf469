"""The authors' call without a processor: prompts of a stock processor hold the untouched model's number of placeholders.

They are shortened before the model sees them, and put back in what ``generate`` returns, so that
``output[:, input_ids.shape[1]:]`` is the answer as always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visionzip.intercept import Interceptions


def keep_mask(input_ids: Tensor, token: int, stock: int, budget: int) -> Tensor:
    """Which places of ``(B, L)`` stay: of every `stock` placeholders in a row of them the first `budget`.

    A run that is not a multiple of `stock` already has its budget (a prompt made by an attached processor) and stays whole.
    """
    image = input_ids == token
    starts = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
    run = starts.cumsum(dim=1) * image  # 0 outside of runs, else the run's number in its row
    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    first = torch.where(starts, place, 0).cummax(dim=1).values
    lengths = torch.zeros(input_ids.shape[0], input_ids.shape[1] + 2, dtype=torch.long, device=input_ids.device)
    lengths = lengths.scatter_add_(1, run, image.long()).gather(1, run)
    return ~image | (lengths % stock != 0) | ((place - first) % stock < budget)


def shorten(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    keep: Tensor,
    extra: dict[str, tuple[Tensor, Any]],
    pad: int,
    left: bool,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Drop the places that `keep` ``(B, L)`` does not hold; rows that get shorter than others are padded again.

    Args:
        extra: name → (``(B, L)`` tensor, its padding), cut likewise (labels, say).
        left: pad on the left, as for generation.
    """
    width = int(keep.sum(dim=1).max())
    if attention_mask is None and bool((keep.sum(dim=1) != width).any()):
        attention_mask = torch.ones_like(input_ids)

    def cut(values: Tensor, filler: Any) -> Tensor:
        rows = values.new_full((len(values), width), filler)
        for row, (source, mask) in enumerate(zip(values, keep, strict=True)):
            kept = source[mask]
            rows[row, width - len(kept) :] = kept if left else rows[row, width - len(kept) :]
            if not left:
                rows[row, : len(kept)] = kept
        return rows

    mask = None if attention_mask is None else cut(attention_mask, 0)
    return cut(input_ids, pad), mask, {name: cut(values, filler) for name, (values, filler) in extra.items()}


def cut_text(model: Any, kwargs: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    """`kwargs` of ``forward`` or ``generate``, all that goes with ``input_ids`` cut to `keep` ``(B, L)``.

    Raises:
        ValueError: for ``position_ids``, which can't be cut.
    """
    if kwargs.get("position_ids") is not None:
        raise ValueError("position_ids were given for a prompt that has to be shortened; leave them out, or attach "
                         "the processor too so that prompts are short from the start")  # fmt: skip
    mask = kwargs.get("attention_mask")
    full = mask is None or bool(mask.all())  # no padding yet: rows for training get it on the right, others on the left
    left = kwargs.get("labels") is None if mask is None or full else bool(mask[:, -1].all())
    fillers = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
    extra = {name: (kwargs[name], filler) for name, filler in fillers.items() if kwargs.get(name) is not None}
    pad = getattr(model.config, "pad_token_id", None)
    ids, mask, cut = shorten(kwargs["input_ids"], mask, keep, extra, pad if pad is not None else 0, left)
    return {**kwargs, "input_ids": ids, **({"attention_mask": mask} if mask is not None else {}), **cut}


@dataclass
class ShortenPrompts:
    """Of a stock processor's `stock` placeholders an image, each `token`, to `budget`.

    Installed on one model: a pre-hook on ``forward`` and a wrapper around ``generate``.
    """

    model: Any  # a transformers model
    token: int
    stock: int
    budget: int
    interceptions: Interceptions = field(default_factory=Interceptions, init=False)
    generating: bool = field(default=False, init=False)  # the prompt was cut already

    def install(self) -> ShortenPrompts:
        self.interceptions.before_forward(self.model, self._forward)
        self.interceptions.replace(self.model, "generate", self._generate)
        return self

    def remove(self) -> None:
        self.interceptions.undo()

    def cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Inputs as they were given → as the model can take them."""
        input_ids = kwargs.get("input_ids")
        if self.generating or input_ids is None or input_ids.shape[1] < self.stock:
            return kwargs
        keep = keep_mask(input_ids, self.token, self.stock, self.budget)
        return kwargs if bool(keep.all()) else cut_text(self.model, kwargs, keep)

    def _forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
            if len(args) > 1:
                raise ValueError("pass everything but input_ids by name to a model attached without its processor")
        return (), self.cut(kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs["inputs"] = args[0]
        if kwargs.get("inputs") is not None:
            kwargs["input_ids"] = kwargs.pop("inputs")
        prompt = kwargs.get("input_ids")
        kwargs = self.cut(kwargs)
        plain: Callable[..., Any] = type(self.model).generate
        self.generating = True
        try:
            output = plain(self.model, *args[1:], **kwargs)
        finally:
            self.generating = False
        if prompt is None or kwargs["input_ids"] is prompt:
            return output
        sequences = output if isinstance(output, Tensor) else output.sequences
        per_prompt = len(sequences) // len(prompt)  # beams or samples returned for each
        new = sequences[:, kwargs["input_ids"].shape[1] :]
        whole = torch.cat((prompt.repeat_interleave(per_prompt, dim=0), new), dim=1)
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output
