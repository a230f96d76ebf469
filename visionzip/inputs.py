"""What a model's ``forward`` takes: images through the processor's image processor, ids with their token types, rows in a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from visionzip.images import ImageError, PadImages, prepare_image
from visionzip.prompts import BaseTemplate, Message
from visionzip.words import count_of

Frames = list[Image.Image]

#: what is made of the text, as opposed to the images
TEXT_KEYS = ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids")


@dataclass(slots=True)
class ImageInputs:
    """`inputs`: what goes into ``forward``, images on dim 0 (``pixel_values``, …).

    `placeholders[k]`: the text that stands for the image or video of index `k`, one placeholder a visual token.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    placeholders: list[str] = field(default_factory=list)


def takes_videos(processor: Any) -> bool:
    """Whether the processor takes videos itself; if not, a video is its frames, each an image."""
    return bool(getattr(processor, "video_token", None)) and getattr(processor, "video_processor", None) is not None


def process_images(
    processor: Any, media: Sequence[Image.Image | Frames], budgets: Sequence[Any] | None = None
) -> ImageInputs:
    """Run the image (and video) processor over everything one prompt shows, then ask how many placeholders each needs.

    Args:
        media: images, prepared by `visionzip.images.prepare_image`; a list of frames is a video.
        budgets: for each of `media` its budget (`visionzip.budgets.as_config`), None for the current one. The inputs then say so,
            for `Attachment.encode`.

    Raises:
        ImageError: when the image processor refuses an image.
        ValueError: for a budget that can't be met, or where budgets can't differ.
    """
    images: list[Image.Image] = []
    videos: list[Frames] = []
    counts: list[tuple[str, int]] = []
    asked: dict[str, list[Any]] = {"image": [], "video": []}
    if budgets is not None and len(budgets) != len(media):
        raise ValueError(
            f"{len(budgets)} budgets were given for {count_of(len(media), 'image')}; expected one for each"
        )
    for each, budget in zip(media, budgets if budgets is not None else [None] * len(media), strict=True):
        if isinstance(each, list) and takes_videos(processor):
            videos.append(each)
            counts.append(("video", 1))
        else:
            shown = each if isinstance(each, list) else [each]
            images += shown
            counts.append(("image", len(shown)))
        asked[counts[-1][0]] += [budget] * counts[-1][1]
    inputs: dict[str, Any] = {}
    image_texts: list[str] = []
    video_texts: list[str] = []
    chosen: dict[str, Any] = {}
    try:
        if images:
            options = {**getattr(processor, "images_kwargs", {}), "return_tensors": "pt"}
            # A list in a list: some processors go by how many images share a prompt (OneVision tiles only a single one).
            found = processor.image_processor(images=[images], **options)
            if budgets is not None:
                image_texts, chosen["image_budgets"] = write_at_budgets(processor, "image", found, asked["image"])
            else:
                image_texts = [processor.replace_image_token(found, index) for index in range(len(images))]
            inputs.update(found)
        if videos:
            options = {"do_sample_frames": False, "return_metadata": True, "return_tensors": "pt"}
            found = processor.video_processor(videos=videos, **options)
            if budgets is not None:
                video_texts, chosen["video_budgets"] = write_at_budgets(processor, "video", found, asked["video"])
            else:
                video_texts = [processor.replace_video_token(found, index) for index in range(len(videos))]
            found.pop("video_metadata", None)  # when its frames are of: for the placeholders, not for the model
            inputs.update(found)
    except BudgetError:
        raise
    except (ValueError, ZeroDivisionError, OverflowError) as error:  # e.g. Qwen refuses 200 times as wide as high
        raise ImageError("image refused", f"by the image processor: {error}") from error
    queues = {"image": iter(image_texts), "video": iter(video_texts)}
    unused = {"num_patches", *getattr(processor, "unused_input_names", ())}  # InternVL's: for the placeholders
    return ImageInputs(
        {name: torch.as_tensor(value) for name, value in inputs.items() if name not in unused} | chosen,
        ["".join(next(queues[kind]) for _ in range(count)) for kind, count in counts],
    )


class BudgetError(ValueError):
    """A budget that can't be met."""


def write_at_budgets(processor: Any, kind: str, found: Any, budgets: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """The placeholders of each image (or video) at its own budget, and ``(dominant, contextual)`` for each of `compress`'s entries.

    Args:
        found: what the image or video processor gave.

    Raises:
        BudgetError: for a budget that can't be met, or where budgets can't differ.
    """
    owner = processor.__dict__.get("_visionzip")
    if owner is None:
        raise BudgetError(
            "budgets for single images need a processor that is attached with its model; see visionzip.attach"
        )
    texts, chosen = [], []
    for index, budget in enumerate(budgets):
        try:
            text, entries = owner.write(processor, kind, found, index, budget)
        except ValueError as error:
            raise BudgetError(str(error)) from None
        texts.append(text)
        chosen += entries
    return texts, chosen


def text_inputs(processor: Any, ids: list[int], answers: Tensor | None = None) -> dict[str, Tensor]:
    """``input_ids`` (L,) with the token types the processor's model wants, under the name it wants them.

    Args:
        answers: (L,) bool, which tokens belong to answers; None for a prompt.
    """
    inputs = {"input_ids": torch.tensor(ids, dtype=torch.long)}
    wants_types = _adds_token_type_ids(processor)
    if getattr(processor, "return_mm_token_type_ids", False):  # which modality: Qwen's positions, Gemma 3's mask
        name = "token_type_ids" if wants_types else "mm_token_type_ids"
        inputs[name] = torch.tensor(processor.create_mm_token_type_ids([ids])[0], dtype=torch.long)
    elif wants_types:  # PaliGemma: up to the first answer tokens attend both ways (0), then to what is before them (1)
        marks = torch.zeros(len(ids), dtype=torch.long) if answers is None else answers.long()
        inputs["token_type_ids"] = marks.cummax(0).values if len(ids) else marks
    return inputs


def prompt_inputs(
    template: BaseTemplate,
    messages: Sequence[Message],
    images: Sequence[Image.Image | Frames] = (),
    pad_images: PadImages = "auto",
    budgets: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """One prompt, up to where the model is to answer the last message: ``input_ids`` (L,), token types and image inputs.

    Args:
        messages: their slots count over `images`.
        pad_images: as `ZipConfig.pad_images`.
        budgets: for each of `images` its budget, as in `process_images`; `Attachment.encode` then has to see the inputs.

    Raises:
        ImageError, PromptError, ValueError: for an image, or a conversation, that can't be used.
    """
    processor = template.processor

    def prepared(image: Image.Image) -> Image.Image:
        return prepare_image(image, processor, pad_images)

    shown = process_images(
        processor, [list(map(prepared, each)) if isinstance(each, list) else prepared(each) for each in images], budgets
    )
    return {**text_inputs(processor, template.prompt(messages, shown.placeholders)), **shown.inputs}


def to_model(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Tensors on the model's device, floating-point ones in its dtype."""
    device, dtype = model.device, model.dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _adds_token_type_ids(processor: Any) -> bool:
    """Whether the processor itself, not one of its parts (most tokenizers name it), has `token_type_ids` among its outputs."""
    if not isinstance(processor, ProcessorMixin):
        return False
    parts = ProcessorMixin.model_input_names.fget(processor)  # type: ignore[attr-defined]
    return list(processor.model_input_names).count("token_type_ids") > list(parts).count("token_type_ids")


def batch_prompts(processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Prompts (each ``input_ids`` (L,), token types and image inputs) → ``(B, L)``, padded on the left for ``generate``."""
    tokenizer = getattr(processor, "tokenizer", processor)
    # A pad id that is never read (the attention mask is 0 there) only has to be a row of the embedding.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    length = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Any] = {
        key: torch.stack([pad_row(row[key], length, pad if key == "input_ids" else 0, left=True) for row in rows])
        for key in TEXT_KEYS
        if key in rows[0]
    }
    masks = [pad_row(torch.ones_like(row["input_ids"]), length, 0, left=True) for row in rows]
    return {**batch, "attention_mask": torch.stack(masks), **merge_image_inputs(rows)}


def pad_row(row: Tensor, length: int, value: int, left: bool = False) -> Tensor:
    """``(L,)`` → ``(length,)``."""
    fill = row.new_full((length - len(row),), value)
    return torch.cat([fill, row] if left else [row, fill])


def merge_image_inputs(rows: Iterable[dict[str, Any]], but: Sequence[str] = TEXT_KEYS) -> dict[str, Any]:
    """Concatenate the rows' image inputs (all keys but `but`) on dim 0; lists are joined. Where dim 1 differs (tiles), shorter
    ones get zeros."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in but:
                found.setdefault(key, []).append(value)
    return {key: _concatenate(values) for key, values in found.items()}


def _concatenate(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [element for value in values for element in value]
    if values[0].ndim > 1 and len({value.shape[1] for value in values}) > 1:
        longest = max(value.shape[1] for value in values)
        values = [
            value
            if value.shape[1] == longest
            else torch.cat([value, value.new_zeros(value.shape[0], longest - value.shape[1], *value.shape[2:])], dim=1)
            for value in values
        ]
    return torch.cat(values)
