"""Qwen's vision transformers (Qwen2-VL, Qwen2.5-VL, Qwen3-VL): images of any size in one packed sequence, no CLS.

Not an `Encoder`: there is no ``N`` that holds for every image, so what it gives is one `Frames` per image. A *group* is the
``s × s`` patches that the merger makes one visual token of; a *frame* is what attends to itself (an image, or two video
frames that were embedded together).

Shapes: ``S`` patches of all images, ``t`` frames of one image, ``n`` groups per frame, ``s`` side of a group, ``H`` heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from visionzip.encoders.base import attention_received, in_own_precision
from visionzip.selectors import Features


@dataclass(frozen=True)
class Frames:
    """One image or video after the encoder, group by group in raster order, not windowed.

    Attributes:
        grid: ``(3,)``: frames, rows and columns of patches.
        features: of the last block; ``hidden_states`` ``(t, n, s²·D)`` is what the merger takes, scores and (rotated) keys
            are averaged over each group.
        deep: ``(layers, t, n, s²·D)``, outputs of the earlier blocks that DeepStack reads; none of them: ``layers`` is 0.
    """

    grid: Tensor
    features: Features
    deep: Tensor


class QwenEncoder:
    """Runs ``patch_embed → blocks`` and reads the last one; merger and DeepStack mergers, which train, are not run.

    The last block has full attention (in Qwen2.5-VL most others have windows, where a patch is seen by its neighbours
    only). Its queries and keys are taken by calling its own ``norm1`` and ``qkv`` once more: 0.8 % of a 32-block encoder.
    """

    @torch.no_grad()
    def encode(self, tower: Any, pixel_values: Tensor, grid_thw: Tensor, *, scores: bool = True) -> list[Frames]:
        """``(S, channels · patch pixels)`` and ``(images, 3)`` frames, rows and columns of patches → one `Frames` per image.

        Raises:
            ValueError: when the patches are not as many as the grids say.
        """
        grids = grid_thw.tolist()  # one wait for a GPU, not one per image
        lengths = [frames * rows * columns for frames, rows, columns in grids]
        if sum(lengths) != len(pixel_values):
            raise ValueError(
                f"{len(pixel_values)} patches were given, but the grids {grids} are of {sum(lengths)}; on a "
                f"cache of an earlier turn, pass the pixels of all images that are in the prompt"
            )
        with in_own_precision(tower, pixel_values.device):
            return self._read(tower, pixel_values, grid_thw, grids, lengths, scores)

    def _read(
        self,
        tower: Any,
        pixel_values: Tensor,
        grid_thw: Tensor,
        grids: list[list[int]],
        lengths: list[int],
        scores: bool,
    ) -> list[Frames]:
        hidden, rotary, windows = self._embed(tower, pixel_values, grid_thw)
        group = tower.spatial_merge_size**2
        deep, block_input = [], hidden
        for number, block in enumerate(tower.blocks):
            block_input = hidden
            hidden = block(hidden, position_embeddings=rotary, **windows.seqlens(number))
            if number in getattr(tower, "deepstack_visual_indexes", ()):
                deep.append(hidden)

        last = tower.blocks[-1]
        queries, keys, _ = last.attn.qkv(last.norm1(block_input)).unflatten(-1, (3, last.attn.num_heads, -1)).unbind(1)
        there = hidden.device  # under a device map blocks may lie on several
        queries, keys = apply_rotary_pos_emb_vision(queries, keys, *(x.to(queries.device) for x in rotary))  # (S, H, d)
        raster = [windows.undo(states.to(there), group) for states in (hidden, queries, keys, *deep)]
        parts = [states.split(lengths) for states in raster]
        return [
            self._frames(grid, frames, group, last.attn.scaling, scores, *states)
            for grid, (frames, _, _), *states in zip(grid_thw, grids, *parts, strict=True)
        ]

    def _frames(
        self,
        grid: Tensor,
        frames: int,
        group: int,
        scale: float,
        scores: bool,
        hidden: Tensor,
        queries: Tensor,
        keys: Tensor,
        *deep: Tensor,
    ) -> Frames:
        """One image: ``(t·h·w, …)`` each → frames of groups."""
        keys, queries = (x.unflatten(0, (frames, -1)).transpose(1, 2) for x in (keys, queries))  # (t, H, h·w, d)
        found = attention_received(queries, keys, scale).unflatten(1, (-1, group)).mean(-1) if scores else None
        metric = keys.mean(dim=1).unflatten(1, (-1, group)).mean(2)  # (t, n, d)
        tokens = hidden.reshape(frames, -1, group * hidden.shape[-1])
        joined = torch.stack([x.reshape(tokens.shape) for x in deep]) if deep else tokens.new_empty(0, *tokens.shape)
        return Frames(grid, Features(tokens, metric, found, has_cls=False), joined)

    def _embed(
        self, tower: Any, pixel_values: Tensor, grid_thw: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Windows]:
        """``(S, D)`` as the first block takes it, the rotation's ``(cos, sin)``, and the order the patches are in."""
        from transformers import vision_utils  # newer than some versions that all other families run on

        side = tower.spatial_merge_size
        hidden = tower.patch_embed(pixel_values)
        if hasattr(tower, "pos_embed"):  # Qwen3-VL: learned positions, resampled to the image's grid
            places, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid_thw,
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=side,
            )
            hidden = hidden + (tower.pos_embed(places) * weights[:, :, None]).sum(1).to(hidden.dtype)
        rotary = tower.rotary_pos_emb(hidden, vision_utils.get_vision_position_ids(grid_thw, side))
        whole = vision_utils.get_vision_attention_seqlens(grid_thw, tower.config)
        if not hasattr(tower, "fullatt_block_indexes"):
            return hidden, rotary, Windows(whole)
        order, cut = vision_utils.get_vision_window_index(
            grid_thw, spatial_merge_size=side, window_size=tower.window_size, patch_size=tower.patch_size
        )
        windows = Windows(whole, order.to(hidden.device), cut, frozenset(tower.fullatt_block_indexes))
        return windows.do(hidden, side**2), (windows.do(rotary[0], side**2), windows.do(rotary[1], side**2)), windows


@dataclass(frozen=True)
class Windows:
    """Qwen2.5-VL orders groups by windows while it encodes. Without windows everything stays as it is.

    Attributes:
        whole: cumulative lengths and longest length of the frames.
        order: ``(S / s²,)``, which group stands where; ``None``: raster order.
        cut: cumulative lengths of the windows.
        full: numbers of the blocks that attend over the whole frame.
    """

    whole: tuple[Tensor, int | None]
    order: Tensor | None = None
    cut: Tensor | None = None
    full: frozenset[int] = frozenset()

    def seqlens(self, block: int) -> dict[str, Any]:
        """Sequence boundaries that the attention of a block needs."""
        if self.cut is None or block in self.full:
            return {"cu_seqlens": self.whole[0], "max_seqlen": self.whole[1]}
        return {"cu_seqlens": self.cut, "max_seqlen": self.longest}

    @cached_property
    def longest(self) -> int | None:
        """Of the windows. FlashAttention asks for it, others don't; one wait for a GPU, not one a block."""
        return None if self.cut is None or self.whole[1] is None else int(self.cut.diff().max())

    def do(self, states: Tensor, group: int) -> Tensor:
        """``(S, …)`` in raster order of groups → in order of windows."""
        return states if self.order is None else states.unflatten(0, (-1, group))[self.order].flatten(0, 1)

    def undo(self, states: Tensor, group: int) -> Tensor:
        """``(S, …)`` in order of windows → in raster order of groups."""
        if self.order is None:
            return states
        return states.unflatten(0, (-1, group))[self.order.argsort().to(states.device)].flatten(0, 1)
