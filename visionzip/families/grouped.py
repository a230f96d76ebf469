"""What InternVL, Gemma 3, Idefics3, SmolVLM and PaliGemma share: tiles of one size, one LLM token from ``side × side`` patches.

**Selection stands after the grouping** (pixel shuffle or pooling) and before the projector. One LLM token is one group, so a
group is what can be kept or dropped. Choosing patches first leaves almost no group whole, as kept patches are scattered: a
group would then be made of patches that are no neighbours (the mistake known from a port for Qwen), or of
few patches and holes the projector never saw. (``python -m scripts.grouping`` counts: the best quarter of an encoder's patches
lies in half of its groups and fills a tenth of them or fewer, while the best quarter of groups holds nearly as much attention.) Grouping itself has no weights, so the result is still frozen and a pure
function of the image; scores and keys are averaged over each group; and the projector runs on ``K`` tokens instead of all.
Contextual tokens are merged there too, in what the projector takes, as the authors do for LLaVA.

Shapes: ``T`` tiles of all images, ``N`` patches of a tile, ``n`` groups of a tile, ``K`` kept of them, ``C`` what the
projector takes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visionzip.compress import Compressed, compress_to_budget
from visionzip.config import ZipConfig
from visionzip.encoders import Layer
from visionzip.encoders.base import in_own_precision
from visionzip.families.base import Family, Patch, VisualTokens
from visionzip.families.stand_ins import FewerPlaceholders, FewerTokenCounts
from visionzip.families.video import stacked
from visionzip.selectors import Features


class Grouped(Family):
    """``(T, 3, height, width)`` → ``(K, C)`` per tile, dominant groups in raster order, then contextual tokens."""

    by_tile: ClassVar[bool] = True
    #: where the processor says how many placeholders it writes a tile
    count_name: ClassVar[str] = "image_seq_length"

    @property
    @abstractmethod
    def side(self) -> int:
        """Side of a group, in patches."""

    @abstractmethod
    def join(self, tokens: Tensor) -> Tensor:
        """``(T, N, D)`` → ``(T, n, C)``, groups in raster order, by the model's own way to make a group one vector."""

    @property
    def stock_layer(self) -> Layer:
        return -1

    def normed(self, tokens: Tensor, layer: Layer) -> Tensor:
        """``(T, N, D)`` of a layer as the model reads it: SigLIP's last norm belongs to it. (Of other layers too: the projector
        was trained on normed tokens.)"""
        return self.model.get_submodule(self.tower).post_layernorm(tokens)

    @property
    def groups(self) -> int:
        """``n``."""
        encoder = self.encoder
        return (encoder.tokens(self.encoder_module) - int(encoder.has_cls)) // self.side**2

    def budget(self, config: ZipConfig) -> tuple[int, int]:
        return config.resolve(self.groups)

    def check(self, config: ZipConfig) -> None:
        self.encoder.layers_run(self.encoder_module, self.layer(config))
        self.budget(config)

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        return {
            "image token id": (self.token(processor)[1], self.model.config.image_token_id),
            "placeholders per tile": (getattr(processor, self.count_name, None), self.groups),
        }

    def token(self, processor: Any) -> tuple[str, int]:
        """What stands for one visual token in a prompt, and its id."""
        return processor.image_token, processor.image_token_id

    @torch.no_grad()
    def tiles(self, config: ZipConfig, pixel_values: Tensor) -> Tensor:
        """``(T, 3, height, width)`` → ``(T, K, C)``."""
        return self.compress_batch(config, pixel_values).tokens

    @torch.no_grad()
    def compress_batch(self, config: ZipConfig, pixel_values: Tensor) -> Compressed:
        """Its `kept` are places among the ``n`` groups."""
        tower = self.model.get_submodule(self.tower)
        with in_own_precision(tower, pixel_values.device):
            found = self.encode(config, pixel_values)
            side, cls = self.side, found.cls
            tokens = self.join(self.normed(found.hidden_states, self.layer(config))[:, cls:])
            there = tokens.device  # under a device map the last norm may lie elsewhere than the layers
            metric = group_mean(found.metric[:, cls:].to(there), side)
            scores = found.scores
            if scores is not None:
                scores = group_mean(scores[:, cls:, None].to(there), side).squeeze(-1)
            return compress_to_budget(Features(tokens, metric, scores, has_cls=False), config)

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        """One entry a *tile*: nothing in ``pixel_values`` says which tiles are of one image, and nothing needs to know."""
        return list(self.tiles(config, image_inputs["pixel_values"]))

    def encoder_output(self, embeddings: list[Tensor], kind: str = "image") -> BaseModelOutputWithPooling:
        return stacked(embeddings)  # they ask for a tensor

    def processor_patches(self, processor: Any, config: ZipConfig) -> list[Patch]:
        token, cut = self.token(processor)[0], GroupCut(self.groups, sum(self.budget(config)))
        found: list[Patch] = [
            (processor, f"replace_{kind}_token", FewerPlaceholders(processor, kind, token, cut))
            for kind in ("image", "video")
            if getattr(processor, f"{kind}_processor", None) is not None
        ]
        if hasattr(type(processor), "_get_num_multimodal_tokens"):  # SmolVLM's processor has none
            found.append((processor, "_get_num_multimodal_tokens", FewerTokenCounts(processor, cut)))
        return found

    def stock_count(self) -> int | None:
        return self.groups

    def token_counts(self, config: ZipConfig, **image_inputs: Any) -> list[tuple[int, int]]:
        return [(self.groups, sum(self.budget(config)))] * len(image_inputs["pixel_values"])


def group_mean(values: Tensor, side: int) -> Tensor:
    """Mean over each ``side × side`` block of a square grid: ``(T, N, d)`` → ``(T, N / side², d)``, in raster order."""
    length = round(values.shape[1] ** 0.5)
    blocks = values.unflatten(1, (length // side, side, length // side, side))
    return blocks.mean(dim=(2, 4)).flatten(1, 2)


@dataclass
class GroupCut:
    """Every run of placeholders is a tile's: `stock` of them, of which `count` stay."""

    stock: int
    count: int

    def run(self, processor: Any, kind: str, inputs: Any, index: int) -> tuple[int, int]:
        return self.stock, self.count

    def apply(self, processor: Any, data: Any, image_sizes: list | None, video_sizes: list | None) -> None:
        if image_sizes is not None:
            fewer = self.stock - self.count
            counts = zip(data.num_image_tokens, data.num_image_patches, strict=True)
            data.num_image_tokens = [tokens - fewer * tiles for tokens, tiles in counts]
