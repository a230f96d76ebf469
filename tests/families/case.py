"""One case a family: a random model with the real checkpoint's shapes, its processor, and the family's slow reference.

A new family is one file ``case_<name>.py`` with a subclass of `Case` called ``CASE = <Name>()``; every property in
``test_properties.py`` then runs over it, and ``docs/models.md`` gets a row (``python -m scripts.models_page``).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from PIL import Image
from torch import Tensor

from visionzip import ZipConfig

HERE = Path(__file__).parent
WORDS = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "USER:",
    "ASSISTANT:",
    "what",
    "is",
    "this",
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "yes",
    "no",
    "how",
    "many",
    "two",
]
QUESTION = "what is this"


class Case:
    """What the properties need to know of a family. Shapes: ``L`` visual tokens of an image, ``hidden`` of the LLM."""

    #: the family's name, as in the table
    name: str
    #: transformers' class, as in the table
    model_class: str
    #: the public checkpoints whose configs are these shapes; the first one's config is the fixture
    checkpoints: tuple[str, ...]
    #: what the family does that others don't, in a few words for the table
    special: str = ""
    #: a budget for most properties
    budget = ZipConfig(dominant=27, contextual=5)
    #: image sizes, (width, height), for the properties that run the model; the first is the usual one, the others differ
    sizes: tuple[tuple[int, int], ...] = ((640, 480), (300, 700))
    #: image sizes, (width, height), for the number of placeholders alone
    many_sizes: tuple[tuple[int, int], ...] = (
        (640, 480), (480, 640), (336, 336), (1000, 250), (250, 1000), (2000, 1500), (50, 40), (337, 671), (1280, 720),
    )  # fmt: skip
    #: images in each turn of a conversation
    turns: tuple[int, ...] = (1, 0, 1)
    #: frames of a video, where the family takes videos
    frames: int = 0
    #: what stands for an image and a video in a prompt
    image_text: str = "<image>"
    video_text: str = "<video>"
    #: the processor takes images row by row
    nested: bool = False
    #: transformers can't load the family's processor without torchvision, which is not installed here
    needs_torchvision: bool = False
    #: the oldest transformers that the family runs on, where that is newer than the library's own bound
    needs_transformers: str = "5.18"
    #: property → why it does not apply; the table says so
    exempt: dict[str, str] = {}  # noqa: RUF012

    # --- what a case has to give ---
    def config(self) -> Any:
        """The real config with widths and depths shrunken, fresh at each call."""
        raise NotImplementedError

    def processor(self) -> Any:
        """A processor for `config`, fresh at each call."""
        raise NotImplementedError

    def everything(self) -> ZipConfig:
        """The budget that keeps every token."""
        raise NotImplementedError

    def reference(self, model: Any, config: ZipConfig, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
        """The slow, obviously right selection, from an untouched model with *eager* attention.

        Returns:
            ``{"image": [(L_i, hidden), …], "video": […]}`` after the projector, keys only where there is such an input.
        """
        raise NotImplementedError

    def uncompressed(self, model: Any, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
        """All tokens of an untouched model in the order a budget of everything gives, without any code of selection."""
        raise NotImplementedError

    def count(self, config: ZipConfig, size: tuple[int, int]) -> int:
        """`size` is (width, height). How many placeholders a single image of `size` (width, height) needs, by arithmetic of its own."""
        raise NotImplementedError

    def video_count(self, config: ZipConfig, frames: int) -> int:
        """How many placeholders a video of `frames` frames needs."""
        raise NotImplementedError

    # --- what most cases need not change ---
    def model(self, attention: str = "sdpa") -> Any:
        """The same random weights at each call. Spread far enough that attention is not uniform."""
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(0)
        config = self.config()
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if parameter.ndim > 1:
                    scale = 1.5 if "q_proj" in name or "k_proj" in name or "qkv" in name else 1.0
                    fan_in = parameter[0].numel()
                    parameter.normal_(0.0, scale / fan_in**0.5, generator=generator)
        model.generation_config.pad_token_id = WORDS.index("<pad>")
        model.generation_config.eos_token_id = None  # random weights: let every test decide the length
        model.generation_config.suppress_tokens = self.placeholder_ids(config)
        return model

    def placeholder_ids(self, config: Any) -> list[int]:
        """Ids a random model must not say, because they would be taken for an image in the next turn."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return sorted({getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)})

    def process(
        self,
        processor: Any,
        texts: list[str],
        images: list[list[Image.Image]] | None = None,
        videos: list[list[Image.Image]] | None = None,
    ) -> dict[str, Any]:
        """Texts and, row by row, their images → what the model's forward takes (a left-padded batch)."""
        processor.tokenizer.padding_side = "left"
        given: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        flat = [image for row in images or [] for image in row]
        if flat:
            given["images"] = images if self.nested else flat
        if videos:
            given["videos"] = videos
        return dict(processor(**given))

    def image_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The part of `inputs` that `compress` takes."""
        text = ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids")
        return {name: value for name, value in inputs.items() if name not in text}

    def only(self, inputs: dict[str, Any], first: int) -> dict[str, Any]:
        """`inputs` with the image inputs of images `first` … alone: what a later turn on a cache is given."""
        media = self.image_inputs(inputs)
        return {name: (value[first:] if name in media else value) for name, value in inputs.items()}

    def logits(self, model: Any, inputs: dict[str, Any], features: dict[str, list[Tensor]]) -> Tensor:
        """An untouched model's logits with `features` put in place of the placeholders, one row of a matrix at a time."""
        ids = inputs["input_ids"]
        embeddings = model.get_input_embeddings()(ids)
        rows = [list(row) for row in embeddings]
        for kind, images in features.items():
            token = getattr(model.config, f"{kind}_token_id")
            places = (ids == token).nonzero().tolist()
            tokens = torch.cat(images)
            assert len(places) == len(tokens), f"{len(places)} placeholders of {kind} for {len(tokens)} tokens"
            for (row, place), visual in zip(places, tokens, strict=True):
                rows[row][place] = visual
        spliced = torch.stack([torch.stack(row) for row in rows])
        hidden = model.model.language_model(inputs_embeds=spliced, attention_mask=inputs["attention_mask"])[0]
        return model.lm_head(hidden)

    def whole_images(self, counts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """`token_counts` of one image; some families count its tiles one by one."""
        return counts

    def prompt(self, images: int = 1, videos: int = 0, question: str = QUESTION) -> str:
        media = [self.image_text] * images + [self.video_text] * videos
        return " ".join(["USER:", *media, question, "ASSISTANT:"])

    def __repr__(self) -> str:
        return self.name


def cases() -> list[Case]:
    """The ``CASE`` of every ``case_*.py`` here, by name; those that the installed transformers can run."""
    found = []
    for path in sorted(HERE.glob("case_*.py")):
        spec = importlib.util.spec_from_file_location(f"tests.families.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if Version(transformers.__version__) >= Version(module.CASE.needs_transformers):
            found.append(module.CASE)
    return found


def real_config(name: str) -> dict[str, Any]:
    """The values of a public checkpoint's ``config.json`` that shape anything, from ``configs/``."""
    return json.loads((HERE / "configs" / f"{name}.json").read_text())


def tokenizer(*special: str) -> Any:
    """A word-level tokenizer of `WORDS` and `special`, which get the ids after them, in that order; BOS in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, *special]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def text_shrunken(special: int) -> dict[str, Any]:
    """Changes that make any Llama-like text config small; `special` tokens come after `WORDS`."""
    return {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": len(WORDS) + special,
        "max_position_embeddings": 16384,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 3,
    }


class PilVideos:
    """A video processor out of an image processor, frame by frame: transformers' own need torchvision."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, videos: list[list[Image.Image]], **kwargs: Any) -> dict[str, Tensor]:
        frames = [self.image_processor(frames, return_tensors="pt")["pixel_values"] for frames in videos]
        return {"pixel_values_videos": torch.stack(frames)}


def with_pil_videos(kind: Any, image_processor: Any, made: Any, videos: Any, **settings: Any) -> Any:
    """A processor of class `kind` with a video processor that its own ``__init__`` would refuse.

    Args:
        made: the tokenizer.
        videos: the video processor.
        settings: what the class's ``__init__`` would have stored.
    """
    from transformers import ProcessorMixin

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        for name in ("image_token", "video_token"):
            word = settings.get(name, f"<{name.removesuffix('_token')}>")
            setattr(self, name, word)
            setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(word))
        for name, value in settings.items():
            setattr(self, name, value)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = videos

    members = {"__init__": init, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)(image_processor, made)


def make_image(seed: int = 0, size: tuple[int, int] = (640, 480)) -> Image.Image:
    """Blotches of colour, so that patches differ; `size` is (width, height)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(2, size[1] // 40), max(2, size[0] // 40), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


def video(seed: int, frames: int, size: tuple[int, int] = (320, 240)) -> list[Image.Image]:
    return [make_image(1000 * (seed + 1) + index, size) for index in range(frames)]
