"""Prompts that hold more placeholders than an image has tokens, shortened on their way into a compressed model.

They are cut before the model sees them, and put back in what ``generate`` returns, so that ``output[:, input_ids.shape[1]:]`` is
the answer as always. Two cases need it: the authors' call without a processor, where a stock processor wrote the untouched
model's number; and per-image budgets, which are known only once an image has gone through the encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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


def keep_of_each(input_ids: Tensor, token: int, written: list[int], kept: list[int]) -> Tensor:
    """Which places of ``(B, L)`` stay: of the `written` placeholders of each image, in order over all rows, the first `kept`.

    Raises:
        ValueError: where there are not as many placeholders as `written` in all.
    """
    image = input_ids == token
    number = image.flatten().cumsum(0).reshape(image.shape) - 1  # of each placeholder, over all rows
    starts = torch.tensor([0, *written], device=input_ids.device).cumsum(0)
    if int(image.sum()) != int(starts[-1]):
        raise ValueError(
            f"the prompt contains {int(image.sum())} image placeholders, but needs {int(starts[-1])} for its images; "
            "make the prompt with the processor that was attached with this model"
        )
    owner = torch.searchsorted(starts, number, right=True).clamp(min=1, max=len(written)) - 1
    place = number - starts[owner]
    return ~image | (place < torch.tensor(kept, device=input_ids.device)[owner])


@dataclass
class PromptCutter(ABC):
    """Installed on one model: a pre-hook on ``forward`` and a wrapper around ``generate``."""

    model: Any  # a transformers model
    interceptions: Interceptions = field(default_factory=Interceptions, init=False)
    generating: bool = field(default=False, init=False)  # the prompt was cut already

    def install(self) -> PromptCutter:
        self.interceptions.before_forward(self.model, self._forward)
        self.interceptions.replace(self.model, "generate", self._generate)
        return self

    def remove(self) -> None:
        self.interceptions.undo()

    @abstractmethod
    def cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Inputs as they were given → as the model can take them."""

    def _cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self.generating else self.cut(kwargs)

    def _forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
            if len(args) > 1:
                raise ValueError("pass everything but input_ids by name to a model attached without its processor")
        return (), self._cut(kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs["inputs"] = args[0]
        if kwargs.get("inputs") is not None:
            kwargs["input_ids"] = kwargs.pop("inputs")
        prompt = kwargs.get("input_ids")
        kwargs = self._cut(kwargs)
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


@dataclass
class ShortenPrompts(PromptCutter):
    """Of a stock processor's `stock` placeholders an image, each `token`, to `budget`."""

    token: int
    stock: int
    budget: int

    def cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        input_ids = kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] < self.stock:
            return kwargs
        keep = keep_mask(input_ids, self.token, self.stock, self.budget)
        return kwargs if bool(keep.all()) else cut_text(self.model, kwargs, keep)


@dataclass
class FitPrompts(PromptCutter):
    """Of the most placeholders an image can need to those it keeps (`ZipConfig.adaptive`).

    Images go through the encoder here, once, and on as ``mm_encoder_outputs``: the number that a prompt is cut to and the
    tokens that fill it come from the same pass.
    """

    attachment: Any  # Attachment

    def cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("input_ids") is None or kwargs.get("pixel_values") is None:
            return kwargs
        inputs, visual_tokens = self.fit(kwargs)
        return {**inputs, "mm_encoder_outputs": self.attachment.encoder_outputs(visual_tokens)}

    def fit(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """(the inputs without pixels, their text cut to what the images kept; `Attachment.compress`'s result)."""
        family = self.attachment.family
        pixels = family.image_inputs(kwargs)
        inputs = {name: value for name, value in kwargs.items() if name not in pixels}
        visual_tokens = self.attachment.compress(**pixels)
        counted = family.token_counts(self.attachment.config, **pixels)
        written = [most if self.attachment.processor_fits else stock for stock, most in counted]
        kept = [len(tokens) for tokens in visual_tokens]
        keep = keep_of_each(inputs["input_ids"], family.image_token_id, written, kept)
        if kept == written:
            return inputs, visual_tokens
        if inputs.get("attention_mask") is not None:
            keep &= inputs["attention_mask"].bool()  # padding is made anew
        return cut_text(self.model, inputs, keep), visual_tokens
