"""Original positions in the LLM (`ZipConfig.positions`): kept tokens stand where they would in the uncompressed prompt.

For models whose positions are one number a token. Renumbering what is kept makes neighbours of patches that are none, and costs what
the LLM knows of places: GAP (arXiv 2506.21873) lifts a pruned LLaVA from 15.3 to 51.4 on RefCOCO by position ids alone. A contextual
token has the position of its target; CLS, which an untouched model leaves out, that of the first patch; and what stands behind an
image is as far off as if nothing had been dropped.

Shapes: ``B`` rows, ``L`` tokens a row, ``K`` kept tokens of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

_AHEAD = "_visionzip_ahead"


@dataclass
class PlacedOutput(BaseModelOutputWithPooling):
    """What ``mm_encoder_outputs`` holds of images under original positions.

    Attributes:
        pooler_output: ``(K, hidden)`` per image.
        places: ``(K,)`` int64 per image: where each token stands among an untouched image's.
    """

    places: Any = None


def stock_places(token: Tensor, cls: int, patches: int, stock: int) -> Tensor:
    """Places of tokens among those of the encoder → their places among the `stock` tokens that the untouched model has of an image.

    Args:
        token: int64 of any shape; 0 is CLS where there is one.
        cls: tokens of the encoder before its `patches`, 0 or 1. An untouched model may leave them out, or put registers before the
            patches, which are its last tokens in any case.
    """
    return torch.where(token < cls, 0, token - cls + stock - patches)


def original_positions(compact: Tensor, image: Tensor, places: list[Tensor], stock: int) -> Tensor:
    """Positions ``(B, L)`` of a compressed prompt, counted without gaps → those of the uncompressed one.

    Args:
        image: ``(B, L)``, which tokens are placeholders of images.
        places: ``(K,)`` of each image, in their order over all rows (`stock_places`).
        stock: tokens of an image before compression.

    Raises:
        ValueError: where there are not as many placeholders as places.
    """
    device = compact.device
    lengths = torch.tensor([len(each) for each in places], device=device)
    place = torch.cat(places).to(device)
    if int(image.sum()) != len(place):
        raise ValueError(
            f"the prompt contains {int(image.sum())} image placeholders, but {len(place)} visual tokens were kept; make the prompt "
            "with the processor that was attached with this model"
        )
    within = torch.cat([torch.arange(len(each), device=device) for each in places])
    dropped = torch.repeat_interleave(stock - lengths, lengths)
    last = within == torch.repeat_interleave(lengths, lengths) - 1
    moved, behind = torch.zeros_like(compact), torch.zeros_like(compact)
    moved[image] = (place - within).to(compact.dtype)
    behind[image] = torch.where(last, dropped, 0).to(compact.dtype)
    return compact + moved + behind.cumsum(dim=1) - behind


def ahead_of(cache: Any, length: int) -> Tensor | None:
    """How far positions are ahead of the number of tokens after the first `length` tokens of a cache ``(B, 1)``; None: not at all."""
    stored: Tensor | None = getattr(cache, _AHEAD, None)
    if stored is None or not length:
        return None
    return stored[:, min(length, stored.shape[1]) - 1, None]


def remember_ahead(cache: Any, past: int, ahead: Tensor, image: Tensor) -> None:
    """Store with a cache of `past` tokens how far ahead the positions of those that are added are ``(B, L)``.

    A cache may be cropped later, hence a number for each token; that of an image's token is that of the text after it.
    """
    backward = ahead.masked_fill(image, torch.iinfo(ahead.dtype).max).flip(1).cummin(dim=1).values.flip(1)
    backward = torch.where(backward == torch.iinfo(ahead.dtype).max, ahead, backward)
    before = ahead_of(cache, past)
    first = ahead.new_zeros(len(ahead), 1) if before is None else before
    stored = getattr(cache, _AHEAD, None)
    known = first.expand(-1, past) if stored is None else torch.nn.functional.pad(stored[:, :past], (0, 0))
    if known.shape[1] < past:  # text that was answered, or asked, since
        known = torch.cat((known, first.expand(-1, past - known.shape[1])), dim=1)
    setattr(cache, _AHEAD, torch.cat((known, backward), dim=1))


def counted(mask: Tensor | None, rows: int, past: int, length: int, device: torch.device) -> Tensor:
    """``(B, L)``: consecutive positions of the `length` tokens after `past`, padding on the left not counted."""
    if mask is None or mask.ndim != 2:
        return torch.arange(past, past + length, device=device).expand(rows, -1)
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]


def encode_pixels(inner: Any, inputs: dict[str, Any]) -> Any:
    """Takes the pixels out of `inputs`, puts what the encoder makes of them into ``mm_encoder_outputs``, and returns that of images."""
    outputs = dict(inputs.get("mm_encoder_outputs") or {})
    if inputs.get("pixel_values") is not None:
        outputs["image"] = inner.get_image_features(inputs["pixel_values"])
        inputs["pixel_values"] = None
        inputs["mm_encoder_outputs"] = outputs
    return outputs.get("image")


@dataclass
class OriginalPositions:
    """Pre-hook of the inner model's ``forward``: computes positions where the caller gave none, and remembers them with the cache."""

    family: Any  # Family

    def __call__(self, inner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        ids = kwargs.get("input_ids")
        if args or ids is None:
            return None
        kwargs = dict(kwargs)
        found, cache = encode_pixels(inner, kwargs), kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        ahead, mask = ahead_of(cache, past), kwargs.get("attention_mask")
        if found is None and ahead is None:
            return args, kwargs
        compact = counted(mask, len(ids), past, ids.shape[1], ids.device)
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = compact if ahead is None else compact + ahead
            if found is not None:
                kwargs["position_ids"] = self.family.original_positions(kwargs["position_ids"], ids, found.places)
        if found is None:
            return args, kwargs
        text: Any = self.family.model.config.get_text_config()
        uses_cache = kwargs.get("use_cache")
        if text.use_cache if uses_cache is None else uses_cache:
            if cache is None:
                cache = kwargs["past_key_values"] = DynamicCache(config=text)
            image = ids == self.family.image_token_id
            remember_ahead(cache, past, kwargs["position_ids"] - compact, image)
        if (
            cache is None and mask is None
        ):  # transformers would take every gap for the beginning of another packed sequence
            kwargs["attention_mask"] = torch.ones_like(ids)
        return args, kwargs


@dataclass
class OriginalGenerationPositions:
    """Stands in for ``_prepare_position_ids_for_generation`` in the instance of one model: ``generate`` computes positions before it
    encodes, so images are encoded here and handed on."""

    family: Any  # Family

    def __call__(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Positions ``(B, L)``. Those of cached tokens are not read."""
        model = self.family.model
        positions = GenerationMixin._prepare_position_ids_for_generation(model, inputs_tensor, model_kwargs)
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        found, ahead = encode_pixels(model.model, model_kwargs), ahead_of(cache, past)
        if model_kwargs.get("pixel_values", 0) is None:
            del model_kwargs["pixel_values"]  # encoded: generate must not do it again
        if ids.ndim != 2 or (found is None and ahead is None):
            return positions
        positions = positions.expand(len(ids), -1).clone()
        if ahead is not None:
            positions[:, past:] += ahead
        if found is not None:
            new = self.family.original_positions(positions[:, past:], ids[:, past:], found.places)
            positions = torch.cat((positions[:, :past], new), dim=1)
        return positions
