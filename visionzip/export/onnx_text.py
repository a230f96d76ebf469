"""What a processor does, as values of ``device.json``; each is compared with the processor itself before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visionzip.attach import Attachment
from visionzip.config import ZipConfig
from visionzip.device.pixels import to_pixels
from visionzip.device.prompt import Turn, encode_conversation
from visionzip.images import padding_colour, pads_images, prepare_image
from visionzip.inputs import process_images
from visionzip.prompts import Message, Slot, usual_template

# private-use characters: no template has a reason to write them
QUESTION, ANSWER, IMAGE, CUT = "\ue0b0", "\ue0b1", "\ue0b2", "\ue0b3"
PROBES = ((40, 32), (333, 500), (900, 120))
"""Sizes of images that the settings are tried with, pixels."""


def image_settings(processor: Any, config: ZipConfig, side: int) -> dict[str, Any]:
    """`visionzip.device.pixels`' settings for a processor.

    Raises:
        ValueError: when they give other pixels than the processor.
    """
    images = processor.image_processor
    size, steps = dict(images.size or {}), []
    if pads_images(processor, config.pad_images):
        steps.append(["pad", list(padding_colour(processor))])
    if getattr(images, "max_image_size", None):  # Idefics3, SmolVLM: first the long side, then a square
        largest = dict(images.max_image_size)["longest_edge"]
        steps += [["longest", size["longest_edge"]], ["exact", [largest, largest]]]
    elif size.get("shortest_edge"):
        steps.append(["shortest", size["shortest_edge"]])
    elif size.get("height"):
        steps.append(["exact", [size["height"], size["width"]]])
    if getattr(images, "do_center_crop", False):
        crop = dict(images.crop_size)
        steps.append(["crop", [crop["height"], crop["width"]]])
    normal = images.do_normalize
    settings: dict[str, Any] = {
        "steps": steps,
        "resample": int(images.resample),
        "scale": float(images.rescale_factor) if images.do_rescale else 1.0,
        "mean": [float(value) for value in images.image_mean] if normal else [0.0] * 3,
        "std": [float(value) for value in images.image_std] if normal else [1.0] * 3,
    }
    generator = np.random.default_rng(0)
    for width, height in PROBES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = whole_image(processor, prepare_image(image, processor, config.pad_images)).inputs["pixel_values"]
        found = to_pixels(image, settings)
        if expected.reshape(-1, *expected.shape[-3:]).shape != (1, 3, side, side):
            raise ValueError(
                f"{type(images).__name__} makes {list(expected.shape)} of an image of {width} × {height} pixels; expected one of {side} × {side}"
            )
        # two grey levels: processors that resize with torchvision round otherwise than Pillow
        if (
            np.abs(found - expected.reshape(3, side, side).numpy()).max()
            > 2 * settings["scale"] / min(settings["std"]) + 1e-5
        ):
            raise ValueError(
                f"{type(images).__name__} prepares images in a way that can't be written down for the device"
            )
    return settings


def whole_image(processor: Any, image: Image.Image) -> Any:
    """`process_images` of one image that is not cut into tiles."""
    images = processor.image_processor
    if not getattr(images, "do_image_splitting", False):
        return process_images(processor, [image])
    images.do_image_splitting = False
    try:
        return process_images(processor, [image])
    finally:
        images.do_image_splitting = True


def prompt_settings(processor: Any, attachment: Attachment, config: ZipConfig, tokenizer_file: Path) -> dict[str, Any]:
    """`visionzip.device.prompt`'s settings for a processor and its template.

    Raises:
        ValueError: when they do not give the ids of the template.
    """
    from tokenizers import Tokenizer

    template = usual_template(processor)

    def written(*turns: bool) -> str:
        """A conversation; for each question, whether it shows an image."""
        messages: list[Message] = []
        for number, image in enumerate(turns):
            slot: list[Any] = [Slot("image", sum(turns[:number]))] if image else []
            messages += [Message("assistant", [ANSWER])] * bool(number) + [
                Message("user", [*slot, f"\n{QUESTION}" if image else QUESTION])
            ]
        chunks = template.spans(messages, generation=True)
        return CUT.join("".join(span.text if span.slot is None else IMAGE for span in chunk) for chunk in chunks)

    plain, image = (written(shown).split(QUESTION) for shown in (False, True))
    later, later_image = (written(False, shown).replace(ANSWER, QUESTION).split(QUESTION) for shown in (False, True))
    shown = whole_image(
        processor, prepare_image(Image.new("RGB", (64, 64)), processor, config.pad_images)
    ).placeholders[0]
    token, _ = (processor.image_token, processor.image_token_id)
    before, after = shown.split(token)[0], shown.split(token)[-1]
    settings: dict[str, Any] = {
        "first": {"plain": plain[0], "image": image[0]},
        "next": {"plain": later[2], "image": later_image[2]},
        "between": later[1],
        "ask": plain[1],
        "image": IMAGE,
        "cut": CUT,
        "image_id": attachment.family.image_token_id,
        "placeholder": {"before": before, "token": token, "after": after},
        "controls": sorted(
            {entry.content for entry in processor.tokenizer.added_tokens_decoder.values() if entry.special} | {token}
        ),
        "begin": [],
    }
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    count = shown.count(token)
    for turns in ((True,), (False,), (True, False, False), (True, True), (False, True, False)):
        texts = [(f"What is {number}, and why?", f"It is {number}.") for number in range(len(turns))]
        messages = []
        for number, image_shown in enumerate(turns):
            slot = [Slot("image", sum(turns[:number]))] if image_shown else []
            messages.append(Message("user", [*slot, f"\n{texts[number][0]}" if image_shown else texts[number][0]]))
            messages += [Message("assistant", [texts[number][1]])] * (number < len(turns) - 1)
        expected = template.prompt(messages, [shown] * sum(turns))
        given = [Turn(question, flag, answer) for (question, answer), flag in zip(texts, turns, strict=True)]
        found = encode_conversation(given, settings, [count] * sum(turns), tokenizer)
        if not settings["begin"] and len(expected) > len(found):
            settings["begin"] = expected[: len(expected) - len(found)]
            found = settings["begin"] + found
        if found != expected:
            raise ValueError(
                "the chat template writes a conversation in a way that can't be written down for the device"
            )
    return settings


def reference_pixels(processor: Any, images: list[Image.Image], config: ZipConfig) -> torch.Tensor:
    """``(B, 3, height, width)`` as the model's own processor makes them of whole images, to compare with."""
    found = [
        whole_image(processor, prepare_image(image, processor, config.pad_images)).inputs["pixel_values"]
        for image in images
    ]
    return torch.cat([each.reshape(-1, *each.shape[-3:]) for each in found])
