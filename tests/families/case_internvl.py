"""InternVL3: tiles of 448 pixels, a pixel shuffle by 2, a CLS token that is dropped."""

from __future__ import annotations

import math
from typing import Any

from tests.families import slow, slow_grouped
from tests.families.case import WORDS, Case, real_config, text_shrunken, tokenizer
from visionzip import ZipConfig

SPECIAL = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
TILE = 448


def without_torchvision(kind: type) -> type:
    """The processor class without its video processor, which would ask for torchvision."""

    class Processor(kind):  # type: ignore[misc,valid-type]
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
            import re

            from transformers.processing_utils import ProcessorMixin

            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            self.image_seq_length = 256
            self.image_token, self.start_image_token, self.end_image_token, self.video_token = SPECIAL
            self.image_token_id, self.start_image_token_id, self.end_image_token_id, _ = (
                tokenizer.convert_tokens_to_ids(list(SPECIAL))
            )
            self.multimodal_pattern = re.compile(f"(?P<image>{self.image_token})|(?P<video>{self.video_token})")

    Processor.__name__ = kind.__name__
    return Processor


def tile_grid(size: tuple[int, int], most: int) -> int:
    """Tiles an image of (width, height) is cut into: the shape nearest to its own, at most `most` tiles.

    Of equally near ones a later (larger) one is taken if the image has more than half its pixels.
    """
    shapes = sorted(
        {(c, r) for n in range(1, most + 1) for c in range(1, n + 1) for r in range(1, n + 1) if 1 <= c * r <= most},
        key=lambda shape: shape[0] * shape[1],
    )
    wanted, best, nearest = size[0] / size[1], (1, 1), math.inf
    for shape in shapes:
        distance = abs(wanted - shape[0] / shape[1])
        larger = distance == nearest and size[0] * size[1] > 0.5 * TILE**2 * shape[0] * shape[1]
        if distance < nearest or larger:
            best, nearest = shape, distance
    return best[0] * best[1]


class InternVLCase(Case):
    name = "InternVL3"
    model_class = "InternVLForConditionalGeneration"
    checkpoints = ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3-38B-hf")
    special = "budget per tile, of groups after the pixel shuffle; a video is tiles"
    fixture = "internvl3_8b"
    image_text = "<IMG_CONTEXT>"
    sizes = ((500, 460), (300, 900))
    needs_torchvision = True
    exempt = {"video": "the untouched model treats frames as tiles of images, and they are compressed as such"}  # noqa: RUF012

    def config(self) -> Any:
        from transformers import AutoConfig

        values = real_config(self.fixture)
        values["text_config"] |= text_shrunken(len(SPECIAL))
        values["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        values["vision_config"] |= {"num_attention_heads": 4, "layer_scale_init_value": 1.0}
        return AutoConfig.for_model(**(values | {"image_token_id": len(WORDS)}))

    def processor(self) -> Any:
        from transformers import GotOcr2ImageProcessor, InternVLProcessor

        images = GotOcr2ImageProcessor(**real_config(self.fixture)["_preprocessor"])
        return without_torchvision(InternVLProcessor)(images, tokenizer(*SPECIAL))

    def everything(self) -> ZipConfig:
        return ZipConfig(dominant=256, contextual=0)

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        inner, pixels = model.model, inputs["pixel_values"]
        vectors = slow_grouped.given_to(inner.multi_modal_projector, lambda: inner.get_image_features(pixels))
        maps, keys = slow_grouped.last_layer(inner.vision_tower, pixels, "attention", "layer")
        kept = slow_grouped.compress(maps, keys, vectors, 2, 1, config)
        return {"image": [inner.multi_modal_projector(tokens) for tokens in kept]}

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        return {"image": list(model.model.get_image_features(inputs["pixel_values"]).pooler_output)}

    def whole_images(self, counts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(sum(before for before, _ in counts), sum(now for _, now in counts))]

    def tiles(self, size: tuple[int, int]) -> int:
        """With the whole image as one more, where it was cut at all."""
        cut = tile_grid(size, real_config(self.fixture)["_preprocessor"]["max_patches"])
        return cut + 1 if cut > 1 else 1

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        return self.tiles(size) * sum(slow.budget(config, 256))

    def only(self, inputs: dict[str, Any], first: int) -> dict[str, Any]:
        before = sum(self.tiles(self.sizes[index % len(self.sizes)]) for index in range(first))
        return inputs | {"pixel_values": inputs["pixel_values"][before:]}


CASE = InternVLCase()
