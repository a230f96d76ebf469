"""Qwen2-VL: pictures of any size, a merger that makes one token of 2 × 2 patches, M-RoPE positions.

**Selection stands after the merger.** The merger takes neighbours; choosing patches before it would join patches that never
were (a known mistake of a public port). What is chosen are groups of 2 × 2, by scores and rotated keys averaged over
each group; the others' *merged embeddings* are added to their targets'. A contextual token takes its target's place, so that
raster order is kept, and each token keeps the position it has in the full layout (`visionzip.families.mrope`).

The merger is also what trains, and it stands between the frozen choice and the merging of contextual tokens. So what
`compress` gives is the merger's *input* and who goes where, and `project` runs the merger on it: the gradient is exact, and the
result is still a pure function of the picture that a cache can hold. The price: as long as tokens are merged (``contextual >
0``), all groups have to be kept, 4·D values each (Qwen2.5-VL-7B: 5120 a group, 14 MB in bf16 for a picture of a megapixel,
where LLaVA at 64 tokens has 0.13 MB). A cache then saves the encoder's time, not space; with ``contextual=0`` it holds the chosen groups alone.

A video's frames are compressed each on its own, as every other family does it. A picture with fewer tokens than an ``int``
budget keeps all it has; budgets are better given as shares (the authors': 0.65 + 0.05).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.processing_utils import MultiModalData

from visionzip.compress import Compressed, compress, listened, take
from visionzip.config import Merge, ZipConfig
from visionzip.encoders.qwen import Frames, QwenEncoder
from visionzip.families.base import FAMILIES, Family, VisualTokens
from visionzip.families.mrope import KINDS, ForwardPositions, GenerationPositions, GridOutput, RopeIndex
from visionzip.selectors import SELECTORS


class Qwen2VL(Family):
    """A `VisualTokens` is a dict, for ``t`` frames of ``n`` groups of which ``K`` places are kept:

    * ``grid`` ``(3,)``, frames, rows and columns of patches;
    * ``groups`` ``(t, n, 4·D)``, the merger's input; ``(t, K, 4·D)`` where nothing is merged;
    * ``kept`` ``(t, K)``, places among the ``n``, ascending;
    * ``targets`` ``(t, contextual)``, which of the ``K`` others are merged into;
    * ``slots`` ``(t, n)``, for each group the one of the ``K`` it goes to, or -1, and ``parts`` ``(t, n)``, one in how many it
      is there (whole numbers, so that a cache in half precision keeps them exact);
    * ``deep`` ``(layers, t, K, 4·D)``, the DeepStack mergers' input, empty where there are none.
    """

    projectors: ClassVar[tuple[str, ...]] = ("model.visual.merger",)
    tower: ClassVar[str] = "model.visual"
    #: the tower itself holds the merger, which trains
    frozen: ClassVar[dict[str, str]] = {"encoder": f"{tower}.blocks", "llm": Family.llm}
    #: a prompt holds a video's frames apart, with text between them
    frames_apart: ClassVar[bool] = False

    @property
    def encoder(self) -> QwenEncoder:  # type: ignore[override]
        return QwenEncoder()

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
                f"would compare patches within a window, not within the picture"
            )

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        vision, pictures = self.model.config.vision_config, processor.image_processor
        return {
            "image token id": (processor.image_token_id, self.model.config.image_token_id),
            "patch size": (getattr(pictures, "patch_size", None), vision.patch_size),
            "merge size": (getattr(pictures, "merge_size", None), vision.spatial_merge_size),
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
                raise ValueError(f"{pixels} without {grid}: the size of each {kind} has to be known")
            found = self.encoder.encode(tower, image_inputs[pixels], image_inputs[grid], scores=scores)
            visual_tokens += [_choose(frames, config) for frames in found]
        return visual_tokens

    def project(self, visual_tokens: list[VisualTokens]) -> list[Tensor]:
        given = cast(list[dict[str, Tensor]], visual_tokens)
        merged = self._merge(self.projectors[0], [picture["groups"] for picture in given])
        return [combine(picture, embeddings) for picture, embeddings in zip(given, merged, strict=True)]

    def outputs(self, visual_tokens: list[VisualTokens], kind: str = "image") -> GridOutput:
        given = cast(list[dict[str, Tensor]], visual_tokens)
        return GridOutput(
            pooler_output=cast(Any, self.project(visual_tokens)),
            kept=[picture["kept"] for picture in given],
            grids=torch.stack([picture["grid"] for picture in given]),
        )

    def _merge(self, name: str, groups: list[Tensor]) -> list[Tensor]:
        """``(t, n, 4·D)`` a picture through the merger `name` in one call → ``(t, n, hidden)`` a picture."""
        merger = self.model.get_submodule(name)
        dtype = next(p.dtype for p in merger.parameters() if p.is_floating_point())
        width = groups[0].shape[-1] // self.model.config.vision_config.spatial_merge_size**2
        sizes = [group.shape[:2] for group in groups]
        merged = merger(torch.cat([group.reshape(-1, width) for group in groups]).to(dtype))
        parts = merged.split([frames * count for frames, count in sizes])
        return [part.unflatten(0, tuple(size)) for part, size in zip(parts, sizes, strict=True)]

    def patches(self, processor: Any, config: ZipConfig) -> list[tuple[object, str, object]]:
        inner = self.model.model
        changes: list[tuple[object, str, object]] = [
            (inner, "get_image_features", GridImages(self, config)),
            (inner, "get_video_features", GridVideos(self, config)),
            (inner, "get_rope_index", RopeIndex(inner, self.frames_apart)),
            (self.model, "_prepare_position_ids_for_generation", GenerationPositions(self.model)),
        ]
        if processor is not None:
            for kind in KINDS:
                changes.append((processor, f"replace_{kind}_token", GridPlaceholders(processor, config, kind)))
            changes.append((processor, "_get_num_multimodal_tokens", GridCounts(processor, config)))
        return changes

    def hooks(self, config: ZipConfig) -> list[RemovableHandle]:
        return [self.model.model.register_forward_pre_hook(ForwardPositions(), with_kwargs=True)]

    def budget(self, config: ZipConfig) -> tuple[int, int]:
        raise ValueError(
            f"{type(self.model).__name__} takes pictures of any size; ask token_counts for the budget of one"
        )

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        counts = []
        for _, _, grid in KINDS.values():
            for frames, rows, columns in image_inputs[grid].tolist() if image_inputs.get(grid) is not None else ():
                tokens = rows * columns // self.model.config.vision_config.spatial_merge_size**2
                counts.append((frames * tokens, frames * sum(config.resolve(tokens, cap=True))))
        return counts


FAMILIES.register("qwen2_vl")(Qwen2VL)


@torch.no_grad()
def _choose(frames: Frames, config: ZipConfig) -> VisualTokens:
    features = frames.features
    dominant, contextual = config.resolve(features.hidden_states.shape[1], cap=True)
    chosen = compress(features, dominant, contextual, selector=config.selector, merge=config.merge)
    kept, order = torch.cat((chosen.kept, chosen.targets), dim=1).sort(dim=1)  # (t, K)
    place = order.argsort(dim=1)  # where each of dominant + contextual stands in raster order
    slots = torch.where(chosen.slots < 0, chosen.slots, place.gather(1, chosen.slots.clamp(min=0)))
    alone = contextual == 0 or config.merge == "none"
    return {
        "grid": frames.grid,
        "groups": take(features.hidden_states, kept) if alone else features.hidden_states,
        "kept": kept,
        "targets": place[:, dominant:] if not alone else place[:, :0],
        "slots": slots,
        "parts": _parts(chosen, config.merge),
        "deep": torch.stack([take(layer, kept) for layer in frames.deep])
        if len(frames.deep)
        else _nothing(frames.deep, kept),
    }


def _nothing(deep: Tensor, kept: Tensor) -> Tensor:
    return deep.new_empty(0, *kept.shape, deep.shape[-1])


def _parts(chosen: Compressed, merge: Merge) -> Tensor:
    """``(t, n)``: `add`: a target is there as a whole, each other one in so many; `mean`: with the target."""
    slots, ones = chosen.slots, torch.ones_like(chosen.slots)
    if merge == "none" or not chosen.targets.shape[1]:
        return ones
    sizes = torch.zeros_like(ones).scatter_add_(1, slots, ones).gather(1, slots)  # groups that go to the same token
    if merge == "mean":
        return sizes
    return (sizes - 1).clamp(min=1).scatter(1, torch.cat((chosen.kept, chosen.targets), dim=1), 1)


def combine(picture: dict[str, Tensor], embeddings: Tensor) -> Tensor:
    """Merged groups ``(t, n, hidden)`` → ``(t·K, hidden)``: kept ones as they are, targets with what goes into them.

    The sum is a product with a matrix of shares, not a scatter-add, whose order on a GPU is random.
    """
    if embeddings.shape[1] == picture["kept"].shape[1]:
        return embeddings.flatten(0, 1)
    kept, targets, slots, parts = (
        picture[name].to(embeddings.device) for name in ("kept", "targets", "slots", "parts")
    )  # under a device map the merger may lie elsewhere than the blocks
    tokens = take(embeddings, kept)
    shares = (slots.unsqueeze(1) == targets.unsqueeze(2)) / parts.unsqueeze(1)  # (t, T, n)
    mixed = (shares @ embeddings.float()).to(embeddings.dtype)
    return tokens.scatter(1, targets.unsqueeze(-1).expand_as(mixed), mixed).flatten(0, 1)


@dataclass
class GridImages:
    """Stands in for ``get_image_features`` in the instance of one inner model."""

    family: Family
    config: ZipConfig

    def __call__(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """Patches of all pictures and their grids → `GridOutput`."""
        return self.features("image", {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw})

    def features(self, kind: str, inputs: dict[str, Any]) -> Any:
        return self.family.outputs(self.family.compress(self.config, **inputs), kind)


@dataclass
class GridVideos(GridImages):
    """Stands in for ``get_video_features``."""

    def __call__(  # type: ignore[override]
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        return self.features("video", {"pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw})


@dataclass
class GridPlaceholders:
    """Stands in for a processor's ``replace_image_token`` or ``replace_video_token``: its own text with fewer placeholders."""

    processor: Any
    config: ZipConfig
    kind: str

    def __call__(self, inputs: dict, *args: int, **kwargs: Any) -> str:
        index = args[0] if args else kwargs.pop(f"{self.kind}_idx")
        stock = getattr(type(self.processor), f"replace_{self.kind}_token")
        text = stock(self.processor, inputs, index, **kwargs)
        token = getattr(self.processor, f"{self.kind}_token")
        merge = getattr(self.processor, f"{self.kind}_processor").merge_size
        _, rows, columns = (int(side) for side in inputs[f"{self.kind}_grid_thw"][index])
        frame = rows * columns // merge**2
        return text.replace(token * frame, token * sum(self.config.resolve(frame, cap=True)))


@dataclass
class GridCounts:
    """Stands in for a processor's ``_get_num_multimodal_tokens``, which serving engines ask for lengths."""

    processor: Any
    config: ZipConfig

    def __call__(
        self, image_sizes: list | None = None, video_sizes: list | None = None, **kwargs: Any
    ) -> MultiModalData:
        stock = type(self.processor)._get_num_multimodal_tokens
        data = stock(self.processor, image_sizes=image_sizes, video_sizes=video_sizes, **kwargs)
        if image_sizes is not None:
            data.num_image_tokens = [sum(self.config.resolve(count, cap=True)) for count in data.num_image_tokens]
        if video_sizes is not None:
            together = self.processor.video_processor.temporal_patch_size
            frames = [-(-int(size[0]) // together) for size in video_sizes]
            data.num_video_tokens = [
                count * sum(self.config.resolve(total // count, cap=True))
                for total, count in zip(data.num_video_tokens, frames, strict=True)
            ]
        return data
