"""Qwen2-VL: images of any size, one token from 2 × 2 patches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from tests.families import slow, slow_qwen
from tests.families.case import WORDS, Case, real_config, text_shrunken, tokenizer
from visionzip import ZipConfig

SPECIAL = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")


class FrameProcessor:
    """Makes patches of a video's frames as the family's video processor does, which needs torchvision."""

    merge_size = 2
    temporal_patch_size = 2

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size

    def fetch_videos(self, videos: Any, **kwargs: Any) -> Any:
        return videos, None

    def __call__(self, videos: list[list[Any]], **kwargs: Any) -> dict[str, Any]:
        """Lists of images → patches of all videos, their grids and their metadata: two frames a second."""
        from transformers.video_utils import VideoMetadata

        patches, grids, metadata = [], [], []
        for frames in videos:
            pixels = np.stack([np.asarray(frame, dtype=np.float32) / 127.5 - 1 for frame in frames])
            unit = self.patch_size * self.merge_size
            pixels = pixels[:, : pixels.shape[1] // unit * unit, : pixels.shape[2] // unit * unit]
            count, height, width, channels = pixels.shape
            t, h, w = count // 2, height // self.patch_size, width // self.patch_size
            cut = pixels.reshape(t, 2, h // 2, 2, self.patch_size, w // 2, 2, self.patch_size, channels)
            patches.append(cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1))
            grids.append([t, h, w])
            metadata.append(VideoMetadata(total_num_frames=count, fps=2.0, frames_indices=list(range(count))))
        return {
            "pixel_values_videos": torch.tensor(np.concatenate(patches)),
            "video_grid_thw": torch.tensor(grids),
            "video_metadata": metadata,
        }


def without_torchvision(kind: type) -> type:
    """The processor class with a `FrameProcessor` where its own video processor would ask for torchvision."""

    class Processor(kind):  # type: ignore[misc,valid-type]
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
            from transformers.processing_utils import ProcessorMixin

            for name, token in zip(("vision_start", "image", "video", "vision_end"), SPECIAL, strict=True):
                setattr(self, f"{name}_token", token)
                setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            self.video_processor = FrameProcessor(image_processor.patch_size)

    Processor.__name__ = kind.__name__
    return Processor


class Qwen2VLCase(Case):
    name = "Qwen2-VL"
    model_class = "Qwen2VLForConditionalGeneration"
    checkpoints = ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-2B-Instruct")
    special = "selection after the merger, which is the trained part; positions of the full layout; budget as a share"
    fixture = "qwen2_vl_7b"
    budget = ZipConfig(dominant=0.65, contextual=0.05)
    sizes = ((280, 196), (140, 308))
    frames = 4
    image_text = "<|vision_start|><|image_pad|><|vision_end|>"
    video_text = "<|vision_start|><|video_pad|><|vision_end|>"
    needs_torchvision = True
    frames_apart = False

    def vision(self) -> dict[str, Any]:
        return {"embed_dim": 32, "hidden_size": 48, "depth": 3, "num_heads": 4}

    def config(self) -> Any:
        from transformers import AutoConfig

        values = real_config(self.fixture)
        rope = values["text_config"]["rope_parameters"]
        values["text_config"] |= text_shrunken(len(SPECIAL)) | {"rope_parameters": rope | {"mrope_section": [2, 2, 2]}}
        values["vision_config"] |= self.vision()
        names = ("vision_start_token_id", "image_token_id", "video_token_id", "vision_end_token_id")
        ids = {name: len(WORDS) + index for index, name in enumerate(names)}
        return AutoConfig.for_model(**(values | ids))

    def processor_class(self) -> type:
        from transformers import Qwen2VLProcessor

        return Qwen2VLProcessor

    def processor(self) -> Any:
        from transformers import Qwen2VLImageProcessor

        images = Qwen2VLImageProcessor(**real_config(self.fixture)["_preprocessor"])
        return without_torchvision(self.processor_class())(images, tokenizer(*SPECIAL))

    def everything(self) -> ZipConfig:
        return ZipConfig(dominant=1.0, contextual=0)

    def _inputs(self, inputs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        kinds = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))
        return [(kind, inputs[pixels], inputs[grid]) for kind, pixels, grid in kinds if pixels in inputs]

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, Any]:
        features: dict[str, Any] = {"places": {}, "deep": {}}
        for kind, pixels, grids in self._inputs(inputs):
            maps, output = slow_qwen.last_maps(model, pixels, grids, kind)
            features[kind], features["places"][kind], features["deep"][kind] = [], [], []
            for number, grid in enumerate(grids.tolist()):
                chosen = slow_qwen.choose(model, grid, maps[: grid[0]], config)
                maps = maps[grid[0] :]
                tokens, places = slow_qwen.compressed(output.pooler_output[number], chosen)
                features[kind].append(tokens)
                features["places"][kind].append(places)
                layers = getattr(output, "deepstack_features", None) or []
                features["deep"][kind].append(
                    [slow_qwen.compressed(layer[number], chosen, deep=True)[0] for layer in layers]
                )
        return features

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        features: dict[str, Any] = {"places": {}, "deep": {}}
        for kind, pixels, grids in self._inputs(inputs):
            output = getattr(model.model, f"get_{kind}_features")(pixels, grids)
            features[kind] = list(output.pooler_output)
            features["places"][kind] = [[list(range(h * w // 4))] * t for t, h, w in grids.tolist()]
            layers = getattr(output, "deepstack_features", None) or []
            features["deep"][kind] = [[layer[number] for layer in layers] for number in range(len(grids))]
        return features

    def step(self, model: Any, inputs: dict[str, Any], index: int) -> float:
        """How far the frames of video `index` are apart in time."""
        return 1

    def logits(self, model: Any, inputs: dict[str, Any], features: dict[str, Any]) -> Any:
        ids = inputs["input_ids"]
        embeddings = model.get_input_embeddings()(ids)
        numbers, images, kinds = {"image": 1, "video": 2}, {}, torch.zeros_like(ids)
        deep: dict[int, list[Any]] = {}
        rows = [list(row) for row in embeddings]
        for kind, _, grids in self._inputs(inputs):
            token = getattr(model.config, f"{kind}_token_id")
            kinds[ids == token] = numbers[kind]
            places = (ids == token).nonzero().tolist()
            for (row, place), visual in zip(places, torch.cat(features[kind]), strict=True):
                rows[row][place] = visual
            images[numbers[kind]] = [
                {"rows": h // 2, "columns": w // 2, "places": where, "step": self.step(model, inputs, i) if kind == "video" else 1}
                for i, ((_, h, w), where) in enumerate(zip(grids.tolist(), features["places"][kind], strict=True))
            ]  # fmt: skip
            for layers in features["deep"][kind]:
                for number, tokens in enumerate(layers):
                    deep.setdefault(number, []).append(tokens)
        assert not (deep and len(images) > 1), "DeepStack features of images and videos would have to be put in order"
        visible = inputs["attention_mask"].bool().tolist()
        where = slow_qwen.positions(kinds.tolist(), visible, images, self.frames_apart)
        more = {}
        if deep:
            joined = [torch.cat(deep[number]) for number in sorted(deep)]
            more = {"visual_pos_masks": kinds > 0, "deepstack_visual_embeds": joined}
        spliced = torch.stack([torch.stack(row) for row in rows])
        mask = inputs["attention_mask"]
        hidden = model.model.language_model(inputs_embeds=spliced, attention_mask=mask, position_ids=where, **more)[0]
        return model.lm_head(hidden)

    def only(self, inputs: dict[str, Any], first: int) -> dict[str, Any]:
        before = int(inputs["image_grid_thw"][:first].prod(-1).sum())
        new = {"pixel_values": inputs["pixel_values"][before:], "image_grid_thw": inputs["image_grid_thw"][first:]}
        return inputs | new

    def groups(self, size: tuple[int, int]) -> int:
        """Groups an image of `size` (width, height) has after resizing."""
        settings = real_config(self.fixture)["_preprocessor"]
        unit = settings["patch_size"] * settings["merge_size"]
        width, height = (round(side / unit) * unit for side in size)
        if width * height > settings["max_pixels"]:
            shrink = math.sqrt(size[0] * size[1] / settings["max_pixels"])
            width, height = (max(unit, math.floor(side / shrink / unit) * unit) for side in size)
        elif width * height < settings["min_pixels"]:
            grow = math.sqrt(settings["min_pixels"] / (size[0] * size[1]))
            width, height = (math.ceil(side * grow / unit) * unit for side in size)
        return width * height // unit**2

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        return sum(slow.budget(config, self.groups(size)))

    def video_count(self, config: ZipConfig, frames: int) -> int:
        unit = 2 * real_config(self.fixture)["_preprocessor"]["patch_size"]
        return frames // 2 * sum(slow.budget(config, (320 // unit) * (240 // unit)))


CASE = Qwen2VLCase()
