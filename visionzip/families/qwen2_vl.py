"""Qwen2-VL: images of any size, a merger that makes one token of 2 × 2 patches, M-RoPE positions.

**Selection stands after the merger.** The merger takes neighbours; choosing patches before it would join patches that never
were (a known mistake of a public port). What is chosen are groups of 2 × 2, by scores and rotated keys averaged over
each group; the others' *merged embeddings* are added to their targets'. A contextual token takes its target's place, so that
raster order is kept, and each token keeps the position it has in the full layout (`visionzip.families.mrope`).

The merger is also what trains, and it stands between the frozen choice and the merging of contextual tokens. So what
`compress` gives is the merger's *input* and who goes where, and `project` runs the merger on it: the gradient is exact, and the
result is still a pure function of the image that a cache can hold. The price: as long as tokens are merged (``contextual >
0``), all groups have to be kept, 4·D values each (Qwen2.5-VL-7B: 5120 a group, 14 MB in bf16 for an image of a megapixel,
where LLaVA at 64 tokens has 0.13 MB). A cache then saves the encoder's time, not space; with ``contextual=0`` it holds the chosen groups alone.

Frames of a video are compressed one by one, as in every other family. An image with fewer tokens than an ``int``
budget keeps all it has; budgets are better given as shares (the authors': 0.65 + 0.05).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from visionzip.compress import compress, listened, merge_weights, take
from visionzip.config import ZipConfig
from visionzip.encoders.qwen import Frames, QwenEncoder
from visionzip.families.base import FAMILIES, Family, Hook, Patch, VisualTokens
from visionzip.families.mrope import KINDS, ForwardPositions, GenerationPositions, GridOutput, RopeIndex
from visionzip.families.stand_ins import FewerPlaceholders, FewerTokenCounts
from visionzip.merges import MERGES
from visionzip.selectors import SELECTORS


class Qwen2VL(Family):
    """A `VisualTokens` is a dict, for ``t`` frames of ``n`` groups of which ``K`` places are kept:

    * ``grid`` ``(3,)``, frames, rows and columns of patches;
    * ``groups`` ``(t, n, 4·D)``, the merger's input; ``(t, K, 4·D)`` where nothing is merged;
    * ``kept`` ``(t, K)``, places among the ``n``, ascending;
    * ``targets`` ``(t, contextual)``, which of the ``K`` others are merged into;
    * ``slots`` ``(t, n)``, for each group the one of the ``K`` it goes to, or -1, and ``weights`` ``(t, n)``, how much of it is
      there (the bits of float32 numbers as int32, so that a cache in half precision keeps them exact);
    * ``deep`` ``(layers, t, K, 4·D)``, the DeepStack mergers' input, empty where there are none.
    """

    projectors: ClassVar[tuple[str, ...]] = ("model.visual.merger",)
    tower: ClassVar[str] = "model.visual"
    #: the tower itself holds the merger, which trains
    frozen: ClassVar[dict[str, str]] = {"encoder": f"{tower}.blocks", "llm": Family.llm}
    inputs: ClassVar[dict[str, tuple[str, ...]]] = {kind: tuple(names) for kind, (_, *names) in KINDS.items()}
    counted: ClassVar[dict[str, str]] = {kind: grid for kind, (_, _, grid) in KINDS.items()}
    images_on_cache: ClassVar[bool] = False
    #: a prompt holds a video's frames apart, with text between them
    frames_apart: ClassVar[bool] = False

    @property
    def encoder(self) -> QwenEncoder:  # type: ignore[override]
        return QwenEncoder()

    @property
    def stock_layer(self) -> int:
        return -1

    def check(self, config: ZipConfig) -> None:
        depth = len(self.model.model.visual.blocks)
        if config.layer not in (None, -1, depth):
            raise ValueError(
                f"layer={config.layer} can't be read: {type(self.model).__name__} reads its last layer (-1 or {depth}), whose "
                f"output the merger was trained on; leave layer out"
            )
        full = getattr(self.model.config.vision_config, "fullatt_block_indexes", None)
        if full is not None and depth - 1 not in full:
            raise ValueError(
                f"the last of {depth} vision blocks has no full attention (only {sorted(full)} have), so its scores "
                f"would compare patches within a window, not within the image"
            )

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        vision, images = self.model.config.vision_config, processor.image_processor
        return {
            "image token id": (processor.image_token_id, self.model.config.image_token_id),
            "patch size": (getattr(images, "patch_size", None), vision.patch_size),
            "merge size": (getattr(images, "merge_size", None), vision.spatial_merge_size),
        }

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        """``pixel_values`` and ``image_grid_thw``, ``pixel_values_videos`` and ``video_grid_thw`` → images, then videos."""
        tower = self.model.get_submodule(self.tower)
        scores = SELECTORS[config.selector].needs_scores or listened()
        visual_tokens: list[VisualTokens] = []
        for kind, (_, pixels, grid) in KINDS.items():
            if image_inputs.get(pixels) is None:
                continue
            if image_inputs.get(grid) is None:
                raise ValueError(
                    f"{pixels} was given without {grid}, which contains the size of each {kind}; pass both"
                )
            found = self.encoder.encode(tower, image_inputs[pixels], image_inputs[grid], scores=scores)
            visual_tokens += [_choose(frames, config) for frames in found]
        return visual_tokens

    def split(self, **image_inputs: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for _, pixels, grid in KINDS.values():
            if image_inputs.get(pixels) is not None:
                grids = image_inputs[grid]
                patches = image_inputs[pixels].split(grids.prod(-1).tolist())
                found += [{pixels: each, grid: grids[place : place + 1]} for place, each in enumerate(patches)]
        return found

    def project(self, visual_tokens: list[VisualTokens]) -> list[Tensor]:
        given = cast(list[dict[str, Tensor]], visual_tokens)
        merged = self._merge(self.projectors[0], [each["groups"] for each in given])
        return [combine(each, embeddings) for each, embeddings in zip(given, merged, strict=True)]

    def outputs(self, visual_tokens: list[VisualTokens], kind: str = "image") -> GridOutput:
        given = cast(list[dict[str, Tensor]], visual_tokens)
        return GridOutput(
            pooler_output=cast(Any, self.project(visual_tokens)),
            kept=[each["kept"] for each in given],
            grids=torch.stack([each["grid"] for each in given]),
        )

    def _merge(self, name: str, groups: list[Tensor]) -> list[Tensor]:
        """``(t, n, 4·D)`` per image through the merger `name` in one call → ``(t, n, hidden)`` per image."""
        merger = self.model.get_submodule(name)
        dtype = next(p.dtype for p in merger.parameters() if p.is_floating_point())
        width = groups[0].shape[-1] // self.model.config.vision_config.spatial_merge_size**2
        sizes = [group.shape[:2] for group in groups]
        merged = merger(torch.cat([group.reshape(-1, width) for group in groups]).to(dtype))
        parts = merged.split([frames * count for frames, count in sizes])
        return [part.unflatten(0, tuple(size)) for part, size in zip(parts, sizes, strict=True)]

    def patches(self, processor: Any, config: ZipConfig) -> list[Patch]:
        return [
            *super().patches(processor, config),
            (self.model.model, "get_rope_index", RopeIndex(self.model.model, self.frames_apart)),
            (self.model, "_prepare_position_ids_for_generation", GenerationPositions(self.model)),
        ]

    def processor_patches(self, processor: Any, config: ZipConfig) -> list[Patch]:
        cut = GridCut(config)
        found: list[Patch] = [
            (
                processor,
                f"replace_{kind}_token",
                FewerPlaceholders(processor, kind, getattr(processor, f"{kind}_token"), cut),
            )
            for kind in self.inputs
        ]
        return [*found, (processor, "_get_num_multimodal_tokens", FewerTokenCounts(processor, cut))]

    def hooks(self, config: ZipConfig) -> list[Hook]:
        return [(self.model.model, ForwardPositions())]

    def budget(self, config: ZipConfig) -> tuple[int, int]:
        raise ValueError(
            f"{type(self.model).__name__} takes images of any size; ask token_counts for the budget of one"
        )

    def usual_tokens(self, config: ZipConfig) -> int:
        """Of an image of 640 × 480 pixels."""
        vision = self.model.config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        return sum(config.resolve(round(640 / unit) * round(480 / unit), cap=True))

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        counts = []
        for _, _, grid in KINDS.values():
            for frames, rows, columns in image_inputs[grid].tolist() if image_inputs.get(grid) is not None else ():
                tokens = rows * columns // self.model.config.vision_config.spatial_merge_size**2
                counts.append((frames * tokens, frames * sum(config.resolve(tokens, cap=True))))
        return counts

    def pixels(self, inputs: dict[str, Any]) -> list[Tensor]:
        """The first of the images that are joined in time of each row of a grid, from flat patches
        ``(sum of t·h·w, 3 · temporal_patch · patch²)``. Their order is that of transformers' ``Qwen2VLImageProcessor``: patches
        that will be merged stand together."""
        vision = self.model.config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        found: list[Tensor] = []
        for pixels, grid in (self.inputs[kind] for kind in self.inputs if inputs.get(self.inputs[kind][0]) is not None):
            grids = inputs[grid]
            for flat, (frames, high, wide) in zip(
                inputs[pixels].split(grids.prod(-1).tolist()), grids.tolist(), strict=True
            ):
                shape = (frames, high // merge, wide // merge, merge, merge, 3, -1, patch, patch)
                first = flat.reshape(shape)[:, ..., 0, :, :]  # (t, rows, columns, merge, merge, 3, patch, patch)
                found += list(first.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(frames, 3, high * patch, wide * patch))
        return found

    def grid(self, patches: int, inputs: dict[str, Any]) -> tuple[int, int]:
        merge = self.model.config.vision_config.spatial_merge_size
        for name in self.counted.values():
            for _, high, wide in inputs[name].tolist() if inputs.get(name) is not None else ():
                if (high // merge) * (wide // merge) == patches:
                    return high // merge, wide // merge
        return super().grid(patches, inputs)


FAMILIES.register("qwen2_vl")(Qwen2VL)


@torch.no_grad()
def _choose(frames: Frames, config: ZipConfig) -> VisualTokens:
    features = frames.features
    dominant, contextual = config.resolve(features.hidden_states.shape[1], cap=True)
    chosen = compress(features, dominant, contextual, selector=config.selector, merge=config.merge)
    kept, order = torch.cat((chosen.kept, chosen.targets), dim=1).sort(dim=1)  # (t, K)
    place = order.argsort(dim=1)  # where each of dominant + contextual stands in raster order
    slots = torch.where(chosen.slots < 0, chosen.slots, place.gather(1, chosen.slots.clamp(min=0)))
    alone = contextual == 0 or not MERGES[config.merge].uses_rest
    return {
        "grid": frames.grid,
        "groups": take(features.hidden_states, kept) if alone else features.hidden_states,
        "kept": kept,
        "targets": place[:, dominant:] if not alone else place[:, :0],
        "slots": slots,
        "weights": merge_weights(features, chosen, config.merge).view(torch.int32),
        "deep": torch.stack([take(layer, kept) for layer in frames.deep])
        if len(frames.deep)
        else _nothing(frames.deep, kept),
    }


def _nothing(deep: Tensor, kept: Tensor) -> Tensor:
    return deep.new_empty(0, *kept.shape, deep.shape[-1])


def combine(visual_tokens: dict[str, Tensor], embeddings: Tensor) -> Tensor:
    """Merged groups ``(t, n, hidden)`` → ``(t·K, hidden)``: kept ones as they are, targets with what goes into them.

    The sum is a product with a matrix of shares, not a scatter-add, whose order on a GPU is random.
    """
    if embeddings.shape[1] == visual_tokens["kept"].shape[1]:
        return embeddings.flatten(0, 1)
    kept, targets, slots, weights = (
        visual_tokens[name].to(embeddings.device) for name in ("kept", "targets", "slots", "weights")
    )  # under a device map the merger may lie elsewhere than the blocks
    tokens = take(embeddings, kept)
    shares = (slots.unsqueeze(1) == targets.unsqueeze(2)) * weights.view(torch.float32).unsqueeze(1)  # (t, T, n)
    mixed = (shares @ embeddings.float()).to(embeddings.dtype)
    return tokens.scatter(1, targets.unsqueeze(-1).expand_as(mixed), mixed).flatten(0, 1)


@dataclass
class GridCut:
    """Every run of placeholders is an image's or a frame's, as many as its grid has groups; `config` says how many stay."""

    config: ZipConfig

    def kept(self, groups: int) -> int:
        return sum(self.config.resolve(groups, cap=True))

    def run(self, processor: Any, kind: str, inputs: Any, index: int) -> tuple[int, int]:
        merge = getattr(processor, f"{kind}_processor").merge_size
        _, rows, columns = (int(side) for side in inputs[f"{kind}_grid_thw"][index])
        groups = rows * columns // merge**2
        return groups, self.kept(groups)

    def apply(self, processor: Any, data: Any, image_sizes: list | None, video_sizes: list | None) -> None:
        if image_sizes is not None:
            data.num_image_tokens = [self.kept(count) for count in data.num_image_tokens]
        if video_sizes is not None:
            together = processor.video_processor.temporal_patch_size
            frames = [-(-int(size[0]) // together) for size in video_sizes]
            data.num_video_tokens = [
                count * self.kept(total // count) for total, count in zip(data.num_video_tokens, frames, strict=True)
            ]
