"""What an encoder adapter must offer, and the attention arithmetic the adapters share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from visionzip.compress import without_autocast
from visionzip.registry import Registry
from visionzip.selectors import Features, joined

# Queries handled at once where attention received is summed: bounds memory to B × H × CHUNK × N floats.
CHUNK = 256
# On a CPU images go through an encoder in slices whose widest activation is at most this large: it then stays in a processor's
# last cache, and below the 32 MB from which glibc takes every allocation from the system anew, zeroed page by page.
SLICE_BYTES = 16 * 2**20

Layer = int | Sequence[int]


class Encoder(ABC):
    """Reads one layer of one kind of vision encoder: hidden states, keys and scores, in one pass and no further.

    An adapter is stateless; the module it reads is passed in, so that one adapter works for every model in the process.
    """

    has_cls: bool

    @abstractmethod
    def tokens(self, tower: Any) -> int:
        """``N``, tokens of an image of the size the encoder was made for, CLS included, registers not."""

    @abstractmethod
    def depth(self, tower: Any) -> int:
        """Number of transformer layers."""

    def registers(self, tower: Any) -> int:
        """Tokens between CLS and the patches that are no part of the image; what is read is without them."""
        return 0

    def width(self, tower: Any) -> int:
        """Width of the widest activation of a token, inside the MLPs."""
        return tower.config.intermediate_size

    def encode(
        self,
        tower: Any,
        pixel_values: Tensor,
        layer: Layer,
        *,
        scores: bool = True,
        grid: tuple[int, int] | None = None,
    ) -> Features:
        """Run the encoder up to the layer that is read.

        Args:
            pixel_values: ``(B, C, height, width)``.
            layer: as in ``hidden_states[layer]`` (0 = embeddings, -1 = last output); for several, their hidden states
                are joined on the last axis and keys and scores come from the deepest.
            scores: compute ``Features.scores``; a selector that needs no attention does without.
            grid: read the images scaled down to so many rows and columns of patches.

        Raises:
            ValueError: for a layer that can't be read, see `layers_run`; for a `grid` where only one size can be read.
        """
        if exporting() and grid is None:  # a graph has one way for batches of any size
            return self.read(tower, pixel_values, layer, scores)
        slices = pixel_values.split(self.at_once(tower, pixel_values))
        with in_own_precision(tower, pixel_values.device):
            if grid is not None:
                patch = tower.config.patch_size
                parts = [scale_down(part, grid[0] * patch, grid[1] * patch) for part in slices]
                return joined([self.read_resized(tower, part, layer, scores) for part in parts])
            return joined([self.read(tower, part, layer, scores) for part in slices])

    @abstractmethod
    def read(self, tower: Any, pixel_values: Tensor, layer: Layer, scores: bool) -> Features:
        """`encode` for as many images as go through at once."""

    def read_resized(self, tower: Any, pixel_values: Tensor, layer: Layer, scores: bool) -> Features:
        """`read` for images of another size than the encoder's own, its positions interpolated."""
        raise ValueError(
            f"{type(tower).__name__} reads images of one size only; choose a selector that does not scale them"
        )

    def at_once(self, tower: Any, pixel_values: Tensor) -> int:
        """Images that go through the encoder together: all of them on an accelerator, `SLICE_BYTES` of them on a CPU."""
        if pixel_values.device.type != "cpu":
            return max(len(pixel_values), 1)
        widest = self.tokens(tower) * self.width(tower) * pixel_values.element_size()
        return max(SLICE_BYTES // widest, 1)

    def layers_run(self, tower: Any, layer: Layer) -> list[int]:
        """`layer` as numbers of layers run before each hidden state that is read.

        Raises:
            ValueError: for a hidden state the encoder does not have, or the embeddings alone, which attend to nothing.
        """
        depth = self.depth(tower)
        wanted = [layer] if isinstance(layer, int) else list(layer)
        resolved = [index if index >= 0 else depth + 1 + index for index in wanted]
        if not resolved or min(resolved) < 0 or max(resolved) > depth:
            raise ValueError(
                f"layer {layer} does not exist: this vision encoder has {depth} layers, so {-depth - 1} … {depth} can be read"
            )
        if max(resolved) == 0:
            raise ValueError(
                f"layer {layer} is the embeddings, before any attention; choose 1 … {depth} or -{depth} … -1"
            )
        return resolved


ENCODERS: Registry[Encoder] = Registry("vision encoder", "visionzip.encoders")


def encoder_for(tower: Any) -> Encoder:
    """The adapter of a vision encoder, by the name of its class or of a base class.

    Raises:
        ValueError: when there is none.
    """
    for kind in type(tower).__mro__:
        adapter = ENCODERS.get(kind.__name__)
        if adapter is not None:
            return adapter
    raise ValueError(
        f"the vision encoder {type(tower).__name__} is not supported; supported: {', '.join(ENCODERS.names())}. "
        f"A new one is one file in visionzip/encoders/."
    )


def exporting() -> bool:
    """Inside of ``torch.export``, which PyTorch says of itself since 2.7."""
    return torch.compiler.is_compiling() and getattr(torch.compiler, "is_exporting", lambda: False)()


def in_own_precision(module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Inside, a module loaded in half precision runs as it does when a cache is written, also under a trainer's ``bf16=True``.

    CUDA's autocast takes norms in float32 and leaves their results so: the whole residual stream of an encoder would be wider, and
    the tokens others than the cache's. A float32 module is left to whoever switched autocast on.
    """
    kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return without_autocast(device) if kind in (torch.bfloat16, torch.float16) else nullcontext()


def scale_down(pixel_values: Tensor, height: int, width: int) -> Tensor:
    """``(B, C, …, …)`` → ``(B, C, height, width)``, antialiased as image processors do."""
    small = torch.nn.functional.interpolate(
        pixel_values.float(), size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return small.to(pixel_values.dtype)


def run_blocks(blocks: Any, hidden_states: Tensor, reads: Sequence[int], *arguments: Any) -> tuple[Tensor, Any, Tensor]:
    """The first ``max(reads)`` transformer layers on ``(B, N, D)``, which is what the first one takes.

    Args:
        reads: numbers of layers run before each hidden state that is read, see `Encoder.layers_run`.
        arguments: what a layer takes beside its input.

    Returns:
        The hidden states that are read, ``(B, N, layers · D)``; the last layer that ran; its input ``(B, N, D)``.
    """
    seen = {0: hidden_states} if 0 in reads else {}
    for number, block in enumerate(blocks[: max(reads)], start=1):
        block_input = hidden_states
        hidden_states = block(hidden_states, *arguments)
        if number in reads:
            seen[number] = hidden_states
    # under a device map layers may lie on several devices
    layers = [seen[number].to(hidden_states.device) for number in reads]
    return layers[0] if len(layers) == 1 else torch.cat(layers, dim=-1), block, block_input


def split_heads(states: Tensor, heads: int) -> Tensor:
    """``(B, N, H·d)`` → ``(B, H, N, d)``."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_from_cls(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """What CLS attends to, summed over heads: ``(B, H, 1, d)`` and ``(B, H, N, d)`` → ``(B, N)`` float32.

    One row of the attention map; the map itself is never formed (VisionZip issues 18, 24, 25 and 29: asking for all maps
    costs SDPA and FlashAttention, and with them the speed-up). Scaled before the product, which float16 could not hold: it ends at
    65,504.
    """
    logits = (query * scale) @ keys.transpose(-1, -2)
    return logits.softmax(dim=-1, dtype=torch.float32).sum(dim=1).squeeze(1)


def attention_received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """What each token receives, mean over heads and queries: ``(B, H, N, d)`` twice → ``(B, N)`` float32.

    For encoders without CLS (SigLIP). Summed in chunks of queries, so that no N×N map a head is ever in memory. The scale is put
    on the queries, which are small: on the products it would be one more pass over what is largest here.
    """
    received = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.float32, device=keys.device)
    for chunk in (queries * scale).split(CHUNK, dim=2):
        received += (chunk @ keys.transpose(-1, -2)).softmax(dim=-1, dtype=torch.float32).sum(dim=(1, 2))
    return received / (queries.shape[1] * queries.shape[2])
