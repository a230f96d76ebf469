"""LLaVA-OneVision: SigLIP tiles of 27 × 27 patches; several images untiled; frames pooled to 14 × 14 after the projector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from tests.families import slow
from tests.families.case import PilVideos, real_config, tokenizer, with_pil_videos
from tests.families.case_llava import LlavaCase
from tests.families.case_llava_next import grid
from visionzip import ZipConfig

TILE, SIDE, POOLED, MOST = 384, 27, 14, 9


def tile_budget(config: ZipConfig, tiles: int) -> tuple[int, int]:
    """Of a tile in a grid of `tiles`: up to nine the budget, above that what nine get, shared."""
    dominant, contextual = slow.budget(config, SIDE**2)
    return (dominant, contextual) if tiles <= MOST else (dominant * MOST // tiles, contextual * MOST // tiles)


class LlavaOnevisionCase(LlavaCase):
    name = "LLaVA-OneVision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    checkpoints = (
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-hf/llava-onevision-qwen2-0.5b-si-hf",
        "llava-hf/llava-onevision-qwen2-7b-si-hf",
        "llava-hf/llava-onevision-qwen2-7b-ov-chat-hf",
    )
    special = "no CLS: attention received; tiles, several images, video selected among pooled positions"
    fixture = "llava_onevision_0_5b"
    media = ("<image>", "<video>")
    frames = 3
    sizes = ((640, 350), (300, 380))
    turns = (2, 0, 1)  # an image is tiled when it is the only one: a second would change the first one's tokens
    needs_torchvision = True
    exempt = {}  # noqa: RUF012

    def image_processor(self) -> Any:
        from transformers import LlavaOnevisionImageProcessorPil

        return LlavaOnevisionImageProcessorPil(
            size={"height": TILE, "width": TILE}, image_grid_pinpoints=real_config(self.fixture)["image_grid_pinpoints"]
        )

    def processor(self) -> Any:
        from transformers import LlavaOnevisionProcessor, SiglipImageProcessorPil

        return with_pil_videos(
            LlavaOnevisionProcessor,
            self.image_processor(),
            tokenizer(*self.media),
            PilVideos(SiglipImageProcessorPil(size={"height": TILE, "width": TILE})),
            num_image_tokens=SIDE**2,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
        )

    def process(
        self,
        processor: Any,
        texts: list[str],
        images: list[list[Image.Image]] | None = None,
        videos: list[list[Image.Image]] | None = None,
    ) -> dict[str, Any]:
        """This processor wants to know which images share a prompt: it is given them row by row."""
        processor.tokenizer.padding_side = "left"
        given: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        if any(images or []):
            given["images"] = [row for row in images or [] if row]
        if videos:
            given["videos"] = videos
        return dict(processor(**given))

    def only(self, inputs: dict[str, Any], first: int) -> dict[str, Any]:
        return {**super().only(inputs, first), "batch_num_images": inputs["batch_num_images"]}

    def everything(self) -> ZipConfig:
        return ZipConfig(dominant=1.0, contextual=0)  # an image's tile has 729, a frame 196

    def layout(self, inputs: dict[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of each image's grid; (0, 0) where a prompt has several."""
        alone = [int(number) == 1 for number in inputs["batch_num_images"] for _ in range(int(number))]
        pinpoints = real_config(self.fixture)["image_grid_pinpoints"]
        return [
            grid((int(size[1]), int(size[0])), pinpoints, TILE) if own else (0, 0)
            for size, own in zip(inputs["image_sizes"], alone, strict=True)
        ]

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        inner = model.model
        if "pixel_values" in inputs:
            found["image"] = []
            for tiles, (rows, columns) in zip(inputs["pixel_values"], self.layout(inputs), strict=True):
                hidden, maps, keys = slow.encode(inner.vision_tower, tiles[: rows * columns + 1], -1)
                kept = []
                for tile in range(rows * columns + 1):
                    dominant, contextual = tile_budget(config, rows * columns if tile else 1)
                    metric = keys[tile].unflatten(-1, (4, -1)).mean(1)
                    kept.append(
                        slow.compress(hidden[tile], maps[tile].mean((0, 1)), metric, dominant, contextual, False)
                    )
                (base, _), others = kept[0], kept[1:]
                order = slow.raster([places for _, places in others], columns, SIDE, cls=False) if others else []
                packed = [*base, *(others[tile][0][place] for tile, place in order)]
                packed += [token for tokens, places in others for token in tokens[len(places) :]]
                embeddings = inner.multi_modal_projector(torch.stack(packed))
                found["image"].append(embeddings if others else torch.cat([embeddings, inner.image_newline[None]]))
        for frames in inputs.get("pixel_values_videos", ()):
            found.setdefault("video", []).append(self.slow_video(inner, config, frames))
        return found

    def slow_video(self, inner: Any, config: ZipConfig, frames: torch.Tensor) -> torch.Tensor:
        """Kept positions are those of the projected and pooled frame; merged ones are pooled from merged corners."""
        hidden, maps, keys = slow.encode(inner.vision_tower, frames, -1)
        weights = pooling_matrix()  # (196, 729)
        tokens = []
        for frame in range(len(frames)):
            metric = weights @ keys[frame].unflatten(-1, (4, -1)).mean(1)
            kept, members = slow.choose(
                weights @ maps[frame].mean((0, 1)), metric, *slow.budget(config, POOLED**2), False
            )
            stock = weights @ inner.multi_modal_projector(hidden[frame])
            tokens += [stock[place] for place in kept]
            corners = [row.nonzero().flatten() for row in weights]
            for target, group in members.items():
                merged = hidden[frame][corners[target]]
                if group:
                    merged = merged + torch.stack([hidden[frame][corners[place]] for place in group]).mean(0)
                tokens.append(weights[target][corners[target]] @ inner.multi_modal_projector(merged))
        return torch.stack([*tokens, inner.image_newline])

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        inner = model.model
        if "pixel_values" in inputs:
            found["image"] = []
            for tiles, (rows, columns) in zip(inputs["pixel_values"], self.layout(inputs), strict=True):
                output = inner.vision_tower(tiles[: rows * columns + 1], output_hidden_states=True)
                tokens = inner.multi_modal_projector(output.hidden_states[-1])
                stitched = tokens[1:].unflatten(1, (SIDE, SIDE)).unflatten(0, (rows, columns))
                found["image"].append(torch.cat([tokens[0], stitched.transpose(1, 2).flatten(0, 3)]))
        if "pixel_values_videos" in inputs:
            found["video"] = list(inner.get_video_features(inputs["pixel_values_videos"]).pooler_output)
        return found

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        rows, columns = grid(size, real_config(self.fixture)["image_grid_pinpoints"], TILE)
        return sum(slow.budget(config, SIDE**2)) + rows * columns * sum(tile_budget(config, rows * columns))

    def video_count(self, config: ZipConfig, frames: int) -> int:
        return frames * sum(slow.budget(config, POOLED**2)) + 1


def pooling_matrix() -> torch.Tensor:
    """(196, 729): what transformers' bilinear pooling does to each patch in turn."""
    patches = torch.eye(SIDE**2).unflatten(1, (SIDE, SIDE)).unsqueeze(1)
    return F.interpolate(patches, size=[POOLED, POOLED], mode="bilinear").flatten(1).T


CASE = LlavaOnevisionCase()
