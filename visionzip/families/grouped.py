"""What InternVL, Gemma 3, Idefics3, SmolVLM and PaliGemma share: tiles of one size, one LLM token from ``side × side`` patches.

**Selection stands after the grouping** (pixel shuffle or pooling) and before the projector. One LLM token is one group, so a
group is what can be kept or dropped. Choosing patches first leaves almost no group whole, as kept patches are scattered: a
group would then be made of patches that are no neighbours (the mistake known from a port for Qwen), or of
few patches and holes the projector never saw. (``python -m scripts.grouping`` counts: the best quarter of an encoder's patches
lies in half of its groups and fills a tenth of them or fewer, while the best quarter of groups holds nearly as much attention.) Grouping itself has no weights, so the result is still frozen and a pure
function of the picture; scores and keys are averaged over each group; and the projector runs on ``K`` tokens instead of all.
Contextual tokens are merged there too, in what the projector takes, as the authors do for LLaVA.

Shapes: ``T`` tiles of all pictures, ``N`` patches of a tile, ``n`` groups of a tile, ``K`` kept of them, ``C`` what the
projector takes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import MultiModalData

from visionzip.config import ZipConfig
from visionzip.encoders import Layer
from visionzip.encoders.base import in_own_precision
from visionzip.families.base import Family, VisualTokens, read, shrink
from visionzip.selectors import Features


class Grouped(Family):
    """``(T, 3, height, width)`` → ``(K, C)`` a tile, dominant groups in raster order, then contextual tokens."""

    #: where the processor says how many placeholders it writes a tile
    count_name: ClassVar[str] = "image_seq_length"

    @property
    @abstractmethod
    def side(self) -> int:
        """Side of a group, in patches."""

    @abstractmethod
    def join(self, tokens: Tensor) -> Tensor:
        """``(T, N, D)`` → ``(T, n, C)``, groups in raster order, by the model's own way to make a group one vector."""

    def layer(self, config: ZipConfig) -> Layer:
        return config.layer if config.layer is not None else -1

    def read(self, tokens: Tensor, layer: Layer) -> Tensor:
        """``(T, N, D)`` of a layer as the model reads it: SigLIP's last norm belongs to it. (Of other layers too: the projector
        was trained on normed tokens.)"""
        return self.model.get_submodule(self.tower).post_layernorm(tokens)

    @property
    def groups(self) -> int:
        """``n``."""
        encoder = self.encoder
        return (encoder.tokens(self.model.get_submodule(self.tower)) - int(encoder.has_cls)) // self.side**2

    def budget(self, config: ZipConfig) -> tuple[int, int]:
        return config.resolve(self.groups)

    def check(self, config: ZipConfig) -> None:
        self.encoder.layers_run(self.model.get_submodule(self.tower), self.layer(config))
        self.budget(config)

    def processor_facts(self, processor: Any) -> dict[str, tuple[Any, Any]]:
        return {
            "image token id": (self.token(processor)[1], self.model.config.image_token_id),
            "placeholders a tile": (getattr(processor, self.count_name, None), self.groups),
        }

    def token(self, processor: Any) -> tuple[str, int]:
        """What stands for one visual token in a prompt, and its id."""
        return processor.image_token, processor.image_token_id

    @torch.no_grad()
    def tiles(self, config: ZipConfig, pixel_values: Tensor) -> Tensor:
        """``(T, 3, height, width)`` → ``(T, K, C)``."""
        layer = self.layer(config)
        tower = self.model.get_submodule(self.tower)
        with in_own_precision(tower, pixel_values.device):
            found = read(self.encoder, tower, pixel_values, layer, config)
            side, cls = self.side, found.cls
            tokens = self.join(self.read(found.hidden_states, layer)[:, cls:])
            there = tokens.device  # under a device map the last norm may lie elsewhere than the layers
            metric = group_mean(found.metric[:, cls:].to(there), side)
            scores = found.scores
            if scores is not None:
                scores = group_mean(scores[:, cls:, None].to(there), side).squeeze(-1)
            return shrink(Features(tokens, metric, scores, has_cls=False), config).tokens

    def compress(self, config: ZipConfig, **image_inputs: Any) -> list[VisualTokens]:
        """One entry a *tile*: nothing in ``pixel_values`` says which tiles are of one picture, and nothing needs to know."""
        return list(self.tiles(config, image_inputs["pixel_values"]))

    def encoder_output(self, embeddings: list[Tensor], kind: str = "image") -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=cast(Any, torch.stack(embeddings)))  # they ask for a tensor

    def patches(self, processor: Any, config: ZipConfig) -> list[tuple[object, str, object]]:
        changes: list[tuple[object, str, object]] = [
            (self.model.model, "get_image_features", TileFeatures(self, config))
        ]
        if processor is not None:
            token, stock, count = self.token(processor)[0], self.groups, sum(self.budget(config))
            for kind in ("image", "video"):
                name = f"replace_{kind}_token"
                if getattr(processor, f"{kind}_processor", None) is not None:
                    changes.append((processor, name, TilePlaceholders(processor, name, token, stock, count)))
            if hasattr(type(processor), "_get_num_multimodal_tokens"):  # SmolVLM's processor has none
                changes.append((processor, "_get_num_multimodal_tokens", TileCounts(processor, stock - count)))
        return changes

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
class TileFeatures:
    """Stands in for ``get_image_features`` in the instance of one inner model; the signature is what ``generate`` inspects."""

    family: Family
    config: ZipConfig

    def __call__(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Tiles → ``pooler_output`` in the form the model takes.

        Raises:
            ValueError: when another layer is asked for than the one the ZipConfig reads.
        """
        stock = getattr(self.family.model.config, "vision_feature_layer", -1)
        reads = self.config.layer if self.config.layer is not None else stock
        if vision_feature_layer is not None and vision_feature_layer not in (reads, stock):
            raise ValueError(
                f"vision_feature_layer={vision_feature_layer} was asked for, but this model is attached to layer {reads}; "
                f"attach it with ZipConfig(layer={vision_feature_layer})"
            )
        inputs = {"pixel_values": pixel_values}
        if pixel_attention_mask is not None:
            inputs["pixel_attention_mask"] = pixel_attention_mask
        return self.family.outputs(self.family.compress(self.config, **inputs))


@dataclass
class TilePlaceholders:
    """Stands in for a processor's method that writes a picture's text: its own text, with fewer placeholders a tile."""

    processor: Any
    name: str
    token: str
    stock: int
    count: int

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        text = getattr(type(self.processor), self.name)(self.processor, *args, **kwargs)
        return text.replace(self.token * self.stock, self.token * self.count)


@dataclass
class TileCounts:
    """Stands in for a processor's ``_get_num_multimodal_tokens``: its own numbers, less what each tile has lost."""

    processor: Any
    fewer: int

    def __call__(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        data = type(self.processor)._get_num_multimodal_tokens(self.processor, image_sizes=image_sizes, **kwargs)
        if image_sizes is not None:
            counts = zip(data.num_image_tokens, data.num_image_patches, strict=True)
            data.num_image_tokens = [tokens - self.fewer * tiles for tokens, tiles in counts]
        return data
