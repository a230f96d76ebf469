"""Small models and processors every test can build in a moment. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

REFERENCE = Path(__file__).parent / "reference"
WORDS = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<image>",
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


def tiny_tokenizer():
    """A word-level tokenizer: 20-odd words, BOS in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def tiny_llava(
    seed: int = 0, *, image: int = 32, patch: int = 8, layers: int = 3, strategy: str = "default", **changes
):
    """A random LLaVA: 16 patches + CLS, 3 vision layers, 2 language layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image,
        patch_size=patch,
        initializer_range=0.5,  # far from uniform attention
    )
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(WORDS),
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=3,
        bos_token_id=0,
        eos_token_id=1,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        **changes,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 3
    model.generation_config.eos_token_id = None  # random weights: let every test decide the length
    return model


def tiny_processor(image: int = 32, patch: int = 8, strategy: str = "default"):
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": image}, crop_size={"height": image, "width": image}, do_convert_rgb=True
    )
    return LlavaProcessor(
        images,
        tiny_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )


def make_image(seed: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Noise, ``size`` = (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
