"""Positions of a compressed prompt in models with M-RoPE: those of the full layout, indexed by what was kept.

A kept token stays where it was in the image, and text behind the image stands as far off as if nothing had been
dropped. The positions themselves are computed by the model's own ``get_rope_index`` on a prompt that is expanded for it;
here is only the expanding and the indexing.

``generate`` computes positions before it encodes, and ``get_rope_index`` is not told what was kept. So both
`GenerationPositions` (on the outer model's instance) and `ForwardPositions` (a pre-hook of the inner model) encode first
and hand the result on as ``mm_encoder_outputs``, which says what was kept. Nothing is stored between calls but the model's own
``rope_deltas``.

Shapes: ``B`` rows, ``L`` tokens a row, ``t`` frames of an image, ``n`` tokens per frame before and ``K`` after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

#: kind → its number in mm_token_type_ids, and the names of its inputs
KINDS = {"image": (1, "pixel_values", "image_grid_thw"), "video": (2, "pixel_values_videos", "video_grid_thw")}


@dataclass
class GridOutput(BaseModelOutputWithPooling):
    """What ``mm_encoder_outputs`` holds for one kind of image.

    Attributes:
        pooler_output: ``(t·K, hidden)`` per image.
        deepstack_features: for each layer that DeepStack feeds, ``(t·K, hidden)`` per image.
        kept: ``(t, K)`` int64 an image: places among the ``n`` tokens of each frame, ascending.
        grids: ``(images, 3)`` int64: frames, rows and columns of patches.
    """

    deepstack_features: Any = None
    kept: Any = None
    grids: Any = None


@dataclass(frozen=True)
class Run:
    """Placeholders in a row: one image, or one frame where a prompt holds a video's frames apart."""

    grid: int  # number of the image they are of
    places: list[int]  # of the full layout, those that are kept
    total: int  # tokens of the full layout


def runs_of(kept: list[Tensor], grids: Tensor, merge: int, frames_apart: bool) -> Iterator[Run]:
    """``(t, K)`` kept places and ``(images, 3)`` grids of patches → the runs of placeholders, in order."""
    for number, (places, (frames, rows, columns)) in enumerate(zip(kept, grids.tolist(), strict=True)):
        total = rows * columns // merge**2
        if frames_apart:
            for frame in places.tolist():
                yield Run(number, frame, total)
        else:
            offsets = torch.arange(frames, device=places.device).unsqueeze(1) * total
            yield Run(number, (places + offsets).flatten().tolist(), frames * total)


@dataclass
class Row:
    """One row of a batch in the full layout: the kind of each token, and which of them the prompt still holds."""

    kinds: list[int]
    kept: list[int]


def expand(kinds: list[int], visible: list[bool], runs: dict[int, Iterator[Run]]) -> tuple[Row, list[tuple[int, int]]]:
    """One row of ``mm_token_type_ids`` → the full layout, and the ``(kind, image)`` it shows.

    An image whose placeholders are all masked (a batch without images gets one, so that every rank runs the projector)
    takes its turn and is left out.
    """
    row, shown = Row([], []), []
    for kind, places in groupby(range(len(kinds)), key=kinds.__getitem__):
        here = list(places)
        seen = [visible[place] for place in here]
        if kind == 0:
            row.kept += range(len(row.kinds), len(row.kinds) + sum(seen))
            row.kinds += [0] * sum(seen)
            continue
        run = next(runs[kind], None)
        if run is None or len(run.places) != len(here):
            wanted = "no image is left" if run is None else f"{len(run.places)} visual tokens were kept"
            raise ValueError(
                f"the prompt holds {len(here)} placeholders in a row where {wanted}; make prompts with the processor that is "
                f"attached with the model, and keep images apart by the tokens its template puts around each"
            )
        if any(seen):
            row.kept += [len(row.kinds) + place for place, on in zip(run.places, seen, strict=True) if on]
            row.kinds += [kind] * run.total
            shown.append((kind, run.grid))
    return row, shown


@dataclass
class RopeIndex:
    """Stands in for ``get_rope_index`` in the instance of one inner model."""

    inner: Any
    frames_apart: bool

    def __call__(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mm_encoder_outputs: dict[str, GridOutput] | None = None,
        second_per_grid_ts: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Positions ``(3, B, L)`` and ``(B, 1)``, what the next token's position is ahead of its number in the row.

        Raises:
            ValueError: when the prompt has other numbers of placeholders than `mm_encoder_outputs` has visual tokens.
        """
        outputs = mm_encoder_outputs or {}
        runs = self._runs(outputs)
        kinds = mm_token_type_ids if mm_token_type_ids is not None else token_kinds(self.inner, input_ids)
        visible = torch.ones_like(kinds).bool() if attention_mask is None else attention_mask.bool()
        rows, shown = [], []
        for row_kinds, row_visible in zip(kinds.tolist(), visible.tolist(), strict=True):
            row, images = expand(row_kinds, row_visible, runs)
            rows.append(row)
            shown += images

        full, deltas = self._stock(rows, shown, outputs, second_per_grid_ts, input_ids.device)
        positions = input_ids.new_zeros(3, *input_ids.shape)
        for number, row in enumerate(rows):
            positions[:, number, visible[number]] = full[:, number, row.kept]
            deltas[number] += max(1, len(row.kinds)) - max(1, len(row.kept))
        return positions, deltas

    def _runs(self, outputs: dict[str, GridOutput]) -> dict[int, Iterator[Run]]:
        merge = self.inner.config.vision_config.spatial_merge_size
        runs: dict[int, Iterator[Run]] = {number: iter(()) for number, *_ in KINDS.values()}
        for kind, found in outputs.items():
            if getattr(found, "kept", None) is None:
                raise ValueError(
                    f"mm_encoder_outputs[{kind!r}] does not say which tokens were kept, which positions need; take it from "
                    f"attached(model).encoder_outputs(...)"
                )
            runs[KINDS[kind][0]] = runs_of(found.kept, found.grids, merge, self.frames_apart and kind == "video")
        return runs

    def _stock(
        self,
        rows: list[Row],
        shown: list[tuple[int, int]],
        outputs: dict[str, GridOutput],
        seconds: Any,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """The model's own positions of the full layout, rows padded on the right."""
        width = max(1, *(len(row.kinds) for row in rows))
        kinds = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        mask = torch.zeros_like(kinds)
        for number, row in enumerate(rows):
            kinds[number, : len(row.kinds)] = torch.tensor(row.kinds, device=device)
            mask[number, : max(1, len(row.kinds))] = (
                1  # a row of nothing would have no positions to take the maximum of
            )
        given: dict[str, Any] = {}
        for kind, (number, _, grid) in KINDS.items():
            order = sorted({image for other, image in shown if other == number})
            if order:
                given[grid] = outputs[kind].grids[order]
            if order and kind == "video" and seconds is not None:
                given["second_per_grid_ts"] = [seconds[image] for image in order]
        return type(self.inner).get_rope_index(self.inner, kinds, mm_token_type_ids=kinds, attention_mask=mask, **given)


def token_kinds(inner: Any, input_ids: Tensor) -> Tensor:
    """``mm_token_type_ids`` of a prompt that came without: 1 image, 2 video, 0 anything else."""
    config = inner.config
    return (input_ids == config.image_token_id).long() + 2 * (input_ids == config.video_token_id).long()


def encode(inner: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Takes the pixels out of `inputs` and puts what the encoder makes of them into its ``mm_encoder_outputs``."""
    outputs = dict(inputs.get("mm_encoder_outputs") or {})
    for kind, (_, pixels, grid) in KINDS.items():
        if inputs.get(pixels) is not None:
            outputs[kind] = getattr(inner, f"get_{kind}_features")(inputs[pixels], inputs.get(grid))
            inputs[pixels] = None
    if outputs:
        inputs["mm_encoder_outputs"] = outputs
    return outputs


def chunk_positions(inner: Any, input_ids: Tensor, inputs: dict[str, Any], past: int) -> Tensor:
    """Positions ``(3, B, L)`` of the tokens after a cache of `past`; sets the model's ``rope_deltas``.

    Args:
        input_ids: ``(B, L)``, the new tokens alone.
        inputs: the rest of what ``forward`` is given; ``attention_mask`` covers the cache too.
    """
    length = input_ids.shape[1]
    mask, kinds = inputs.get("attention_mask"), inputs.get("mm_token_type_ids")
    names = ("second_per_grid_ts", "mm_encoder_outputs")
    positions, deltas = inner.get_rope_index(
        input_ids,
        mm_token_type_ids=None if kinds is None else kinds[:, -length:],
        attention_mask=None if mask is None else mask[:, -length:],
        **{name: inputs.get(name) for name in names},
    )
    if past:
        before = past if mask is None else mask[:, :past].sum(dim=1, keepdim=True)
        earlier = 0 if inner.rope_deltas is None else inner.rope_deltas.to(deltas.device)
        positions = positions + (before + earlier)
        deltas = deltas + earlier
    inner.rope_deltas = deltas
    return positions


@dataclass
class ForwardPositions:
    """Pre-hook of the inner model's ``forward``: encodes and computes positions where the caller gave none."""

    def __call__(self, inner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if args or kwargs.get("input_ids") is None or kwargs.get("position_ids") is not None:
            return None
        kwargs = dict(kwargs)
        if encode(inner, kwargs):
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            kwargs["position_ids"] = chunk_positions(inner, kwargs["input_ids"], kwargs, past)
        return args, kwargs


@dataclass
class GenerationPositions:
    """Stands in for ``_prepare_position_ids_for_generation`` in the instance of one model.

    On the cache of an earlier turn it takes the pixels of the new images, or of all that are in the prompt (the untouched
    model takes neither).
    """

    model: Any

    def __call__(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Positions ``(4, B, L)``: of text, then of time, rows and columns. Those of cached tokens are not read."""
        inner = self.model.model
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        given = any(model_kwargs.get(pixels) is not None for _, pixels, _ in KINDS.values())
        if ids.ndim != 2 or not (given or model_kwargs.get("mm_encoder_outputs")):
            return type(self.model)._prepare_position_ids_for_generation(self.model, inputs_tensor, model_kwargs)
        if past:
            forget_cached(inner, ids, model_kwargs, past)
        encode(inner, model_kwargs)
        for _, pixels, _ in KINDS.values():
            model_kwargs.pop(pixels, None)  # encoded: generate must not do it again
        text = GenerationMixin._prepare_position_ids_for_generation(self.model, inputs_tensor, model_kwargs)
        positions = text.unsqueeze(0).expand(3, *ids.shape).clone()
        positions[:, :, past:] = chunk_positions(inner, ids[:, past:], model_kwargs, past)
        return torch.cat((text.expand(ids.shape).unsqueeze(0), positions))


def forget_cached(inner: Any, input_ids: Tensor, inputs: dict[str, Any], past: int) -> None:
    """Drop from `inputs` the images whose placeholders are in the cache already, if they were passed once more."""
    kinds = inputs.get("mm_token_type_ids")
    kinds = (kinds if kinds is not None else token_kinds(inner, input_ids)).tolist()
    apart = inner.get_rope_index.frames_apart
    for kind, (number, pixels, grid) in KINDS.items():
        if inputs.get(pixels) is None:
            continue
        runs_new: list[bool] = []  # for each run of placeholders, whether it is behind the cache
        for row in kinds:
            starts = [place for place, (a, b) in enumerate(zip([0, *row], row, strict=False)) if b == number != a]
            runs_new += [place >= past for place in starts]
        runs = inputs[grid][:, 0] if kind == "video" and apart else torch.ones(len(inputs[grid]), dtype=torch.long)
        if len(runs_new) != int(runs.sum()) or all(runs_new):
            continue  # only the new ones were passed
        firsts = (runs.cumsum(0) - runs).tolist()
        new = [index for index, first in enumerate(firsts) if runs_new[first]]
        parts = inputs[pixels].split(inputs[grid].prod(-1).tolist())
        inputs[pixels] = torch.cat([parts[index] for index in new]) if new else None
        inputs[grid] = inputs[grid][new] if new else None
        if kind == "video" and inputs.get("second_per_grid_ts") is not None:
            inputs["second_per_grid_ts"] = [inputs["second_per_grid_ts"][index] for index in new]
