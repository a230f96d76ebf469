"""Training on visual tokens that were computed before: what the model needs for it, and what it can do without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data.cache import check_identity, identity
from data.cache.reader import VISUAL, VISUAL_VIDEO
from data.partial import load_without
from train.config import RunConfig
from visionzip import Attachment, attached
from visionzip.fingerprint import remember


class FromCache:
    """Before the inner model's forward: cached tokens → projector → `mm_encoder_outputs`.

    Inside the forward, not before it: ZeRO-3 gathers the projector there, autocast is on there, and it is where the projector
    runs on pixels too.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        outputs: dict[str, Any] = {}
        for kind, name in (("image", VISUAL), ("video", VISUAL_VIDEO)):
            pictures = kwargs.pop(name, None)
            if pictures:
                outputs |= self.attachment.encoder_outputs(pictures, kind)
        if outputs:
            kwargs["mm_encoder_outputs"] = outputs
        return args, kwargs


def read_from_cache(model: Any) -> None:
    """Let the attached `model` take batches that hold cached tokens in place of pixels."""
    attachment = attached(model)
    assert attachment is not None
    attachment.model.model.register_forward_pre_hook(FromCache(attachment), with_kwargs=True, prepend=True)


def short_prompts(model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Where each picture has a budget of its own and comes as pixels: it goes through the encoder, and the text is cut to what it
    kept. The tokens are then those of a cache (`read_from_cache`); without such budgets nothing is done."""
    attachment = attached(model)
    if attachment is None or attachment.config.adaptive is None or inputs.get("pixel_values") is None:
        return inputs, labels
    fitted, pictures = attachment.fit({**inputs, "labels": labels})
    labels = fitted.pop("labels")
    return {**fitted, VISUAL: pictures}, labels


def check_cache(config: RunConfig, model: Any, processor: Any, folder: str) -> None:
    """Refuse a cache that was made with anything else than this run has. `model` is attached; its encoder may be without weights.

    The encoder alone is then read for a moment, to be compared.

    Raises:
        CacheError: what differs, by name.
    """
    section = config.model
    family = attached(model).family  # type: ignore[union-attr]
    tower = model.get_submodule(family.frozen["encoder"])
    whole = model
    if next(tower.parameters(), None) is None:
        whole = load_without(section.path, ["llm"], **section.source_options, dtype=getattr(torch, section.dtype))
    wanted = identity(whole, processor, config.zip, config.data, section.dtype)
    stored = check_identity(folder, wanted)
    if whole is not model:
        remember(tower, stored["encoder"]["encoder"])
