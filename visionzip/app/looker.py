"""What the page does, without the page: read an image, change the budget, show a patch's attention, ask."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from visionzip.analysis.ask import Answer, ask
from visionzip.analysis.attention import attention_map
from visionzip.analysis.trace import Tile, Trace, image_inputs, trace
from visionzip.attach import attach, attached, detach
from visionzip.budgets import ladder
from visionzip.config import ZipConfig
from visionzip.images import decode_image


@dataclass
class Look:
    """An uploaded image, as the encoder receives it.

    `maps` ``(tiles, N, N)``: attention, computed when a patch is first clicked. `shown`: the tile as last drawn.
    """

    image: Image.Image
    trace: Trace
    maps: Tensor | None = None
    shown: Tile | None = None


@dataclass(frozen=True)
class Pair:
    """The same question with all visual tokens and with few."""

    full: Answer
    compressed: Answer
    full_tokens: int
    tokens: int


class Looker:
    """One attached model and its processor. Only one call runs the model at a time."""

    def __init__(self, model: Any, processor: Any) -> None:
        attachment = attached(model)
        if attachment is None:
            raise ValueError("nothing is attached to this model; load it with a budget")
        self.model, self.processor, self.config = model, processor, attachment.config
        self.lock = threading.Lock()
        self.warm = False

    def look(self, path: str | Path) -> Look:
        """Read an image and run the encoder on it.

        Raises:
            ValueError: if the image can't be read.
        """
        image = decode_image(path)
        with self.lock:
            return Look(image, trace(self.model, image))

    def blank(self) -> tuple[Tile, tuple[int, int, int]]:
        """A tile of a blank image and its `budget`, which the sliders show before an image is uploaded."""
        with self.lock:
            tile = trace(self.model, Image.new("RGB", (640, 480), (127, 127, 127))).tiles[0]
        return tile, self.budget(tile)

    def budget(self, tile: Tile) -> tuple[int, int, int]:
        """``(dominant, contextual, tokens of the encoder)`` of the attached budget for this tile."""
        total = tile.features.hidden_states.shape[1]
        return *self.config.resolve(total, reserved=tile.cls, cap=True), total

    def trained_budgets(self) -> list[tuple[int, int]]:
        """``(dominant, contextual)`` of each budget that the projector is trained for; empty for a fixed budget.

        Shares are left out: their number of tokens is not known without an image.
        """
        if self.config.budgets is None:
            return []
        return [(int(kept), int(merged)) for kept, merged in ladder(self.config) if isinstance(kept, int)]

    def with_budget(self, dominant: int, contextual: int, selector: str = "", merge: str = "") -> ZipConfig:
        changes = {"dominant": int(dominant), "contextual": int(contextual)}
        named = {key: value for key, value in (("selector", selector), ("merge", merge)) if value}
        return ZipConfig(**{**self.config.model_dump(), **changes, **named})

    def attention_of(self, look: Look, number: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
        """The attention from and to a patch of tile `number`, both ``(rows, columns)``.

        Patch ``p`` is token ``p + 1`` if there is a CLS token (the authors' demo does not take it into account and is off by one).

        Raises:
            ValueError: if the encoder has no attention map of single patches.
        """
        tile = look.trace.tiles[number]
        if look.maps is None:
            with self.lock:
                look.maps = attention_map(
                    self._attachment(), image_inputs(self.processor, look.image, self.config.pad_images)
                )
        total = tile.features.hidden_states.shape[1]
        if look.maps.shape[1] != total:
            raise ValueError(
                f"this model selects among {total} tokens, each made of several of the encoder's {look.maps.shape[1]} patches, so "
                f"there is no attention per patch to show"
            )
        token, first = patch + tile.cls, tile.cls
        found = look.maps[number]
        return found[token, first:].reshape(tile.grid).numpy(), found[first:, token].reshape(tile.grid).numpy()

    def answers(self, look: Look, question: str, config: ZipConfig, length: int = 64) -> Pair:
        """The question with all visual tokens, then with `config`'s.

        Raises:
            ValueError: for an empty question, or a budget that can't be met.
        """
        if not question.strip():
            raise ValueError("the question is empty; type one first")
        pad_images = self.config.pad_images
        with self.lock:
            before = self._attachment().config
            if not self.warm:  # the first run in a process includes one-time costs
                ask(self.model, self.processor, look.image, question, max_new_tokens=2, pad_images=pad_images)
                self.warm = True
            try:
                attach(self.model, self.processor, config)
                inputs = image_inputs(self.processor, look.image, self.config.pad_images)
                ((full_tokens, tokens),) = self._attachment().token_counts(**inputs)
                compressed = ask(
                    self.model, self.processor, look.image, question, max_new_tokens=length, pad_images=pad_images
                )
                detach(self.model)
                full = ask(
                    self.model, self.processor, look.image, question, max_new_tokens=length, pad_images=pad_images
                )
            finally:
                attach(self.model, self.processor, before)
        return Pair(full, compressed, full_tokens, tokens)

    def _attachment(self) -> Any:
        attachment = attached(self.model)
        assert attachment is not None
        return attachment


def patch_at(tile: Tile, size: tuple[int, int], x: float, y: float) -> int:
    """The patch under a point of a drawing of ``size`` (width, height) pixels."""
    rows, columns = tile.grid
    column = min(columns - 1, max(0, int(x * columns / size[0])))
    row = min(rows - 1, max(0, int(y * rows / size[1])))
    return row * columns + column
