"""Training on visual tokens from a cache (`data.cache`) in place of pixels."""

from __future__ import annotations

from typing import Any

import torch

from data.cache import check_identity, identity
from data.cache.reader import VISUAL, VISUAL_VIDEO
from data.partial import load_without
from train.config import RunConfig
from visionzip import Attachment, attached
from visionzip.fingerprint import remember_fingerprint
from visionzip.intercept import Interceptions


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
            images = kwargs.pop(name, None)
            if images:
                outputs |= self.attachment.encoder_outputs(images, kind)
        if outputs:
            kwargs["mm_encoder_outputs"] = outputs
        return args, kwargs


def read_from_cache(model: Any) -> Interceptions:
    """Let the attached `model` take batches with visual tokens in place of pixels; undoing what is returned ends it."""
    attachment = attached(model)
    assert attachment is not None
    put = Interceptions()
    put.before_forward(attachment.model.model, FromCache(attachment), prepend=True)
    return put


def place_tokens(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """With `zip.positions: original` (else nothing is done): `position_ids` ``(B, L)`` for rows that are padded on the right, and visual tokens in place of
    pixels, since positions depend on what was kept. Samples can then be packed, and share a prefix."""
    attachment = attached(model)
    if attachment is None or attachment.config.positions != "original":
        return inputs
    pixels = attachment.family.image_inputs(inputs)
    if pixels:
        inputs = {name: value for name, value in inputs.items() if name not in pixels}
        inputs[VISUAL] = attachment.compress(**pixels)
    ids = inputs["input_ids"]
    compact = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    places = [each["places"] for each in inputs.get(VISUAL) or []]
    family: Any = attachment.family
    positions = family.original_positions(compact, ids, places) if places else compact
    return {**inputs, "position_ids": positions}


def check_cache(config: RunConfig, model: Any, processor: Any, folder: str) -> None:
    """Refuse a cache that was made with other settings or another encoder. `model` is attached; its encoder may be without weights.

    It is then loaded by itself, to be compared.

    Raises:
        CacheError: names what differs.
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
        remember_fingerprint(tower, stored["encoder"]["encoder"])
