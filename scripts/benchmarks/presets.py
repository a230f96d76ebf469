"""Models of real shapes with random weights, and conversations of real lengths. Nothing is downloaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": 336, "patch_size": 14}  # fmt: skip
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "vocab_size": 32064, "max_position_embeddings": 4096}  # fmt: skip
LLAMA_13B = {
    **LLAMA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}


@dataclass(frozen=True)
class Preset:
    """One model's shapes and the work of one optimizer step.

    `batch` samples a micro-batch and `accumulation` of them a step; `dominant` and `contextual` a picture (or tile); `tiles` a
    image has, `full` visual tokens of the uncompressed image.
    """

    vision: dict[str, int]
    text: dict[str, int]
    batch: int
    accumulation: int
    dominant: int = 54
    contextual: int = 10
    tiles: int = 1
    full: int = 576
    dtype: torch.dtype = torch.bfloat16

    @property
    def kept(self) -> int:
        return (self.dominant + self.contextual) * self.tiles


PRESETS = {
    "tiny": Preset(
        vision={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
                "image_size": 80, "patch_size": 8},
        text={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "vocab_size": 1000, "max_position_embeddings": 4096},
        batch=4, accumulation=2, dominant=14, contextual=3, full=100, dtype=torch.float32),
    "cpu": Preset(
        vision={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                "image_size": 224, "patch_size": 16},
        text={"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
              "vocab_size": 32000, "max_position_embeddings": 4096},
        batch=8, accumulation=2, full=196, dtype=torch.float32),
    "llava-1.5-7b-proportions": Preset(  # 24 × 24 patches; a thin encoder that costs a twentieth of the LLM's step on all tokens
        vision={"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 4,
                "image_size": 336, "patch_size": 14},
        text={"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
              "vocab_size": 32000, "max_position_embeddings": 4096},
        batch=8, accumulation=1, dtype=torch.float32),
    "llava-1.5-7b": Preset(CLIP_L, LLAMA_7B, batch=16, accumulation=8),
    "llava-next-7b": Preset(CLIP_L, LLAMA_7B, batch=16, accumulation=8, dominant=27, contextual=5, tiles=5, full=2880),
    "llava-1.5-13b": Preset(CLIP_L, LLAMA_13B, batch=16, accumulation=8),
}  # fmt: skip


@contextmanager
def on_device(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside get their weights on `device` in `dtype` at once: 13 B parameters never pass through the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(preset: Preset, device: torch.device, seed: int = 0) -> Any:
    """A LLaVA-1.5 of the preset's shapes, random weights, in eval mode with nothing but its projector trainable."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**preset.text, pad_token_id=0, tie_word_embeddings=False)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**preset.vision),
        text_config=text,
        image_token_id=preset.text["vocab_size"] - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    with on_device(device, preset.dtype):
        model = LlavaForConditionalGeneration(config).eval()
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.requires_grad_(True)
    return model


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# LLaVA's v1 template: tokens of "<s>" and the system prompt up to the image, and of " USER: ", " ASSISTANT: ", "</s>" a round.
SYSTEM_TOKENS = 36
ROUND_TOKENS = 12
IGNORE = -100


@dataclass(frozen=True)
class Conversation:
    """`input_ids` and `labels` ``(L,)`` with the image's placeholders in them, and which image it is about."""

    input_ids: Tensor
    labels: Tensor
    picture: int


def conversations(preset: Preset, count: int, visual: int, seed: int = 0) -> list[Conversation]:
    """Rounds of question and answer about an image each: an assumption, made to look like an instruction mix, not one itself.

    One to six rounds per image, questions of 8 to 24 tokens, answer lengths log-normal (median 12, sigma 1.2: mostly short, some
    of hundreds), at most 1,500 tokens of text. That is some 220 text tokens in the mean, of which four in ten are supervised.
    """
    generator = torch.Generator().manual_seed(seed)
    image_token, vocabulary = preset.text["vocab_size"] - 1, preset.text["vocab_size"] - 2
    system = torch.randint(1, vocabulary, (SYSTEM_TOKENS,), generator=torch.Generator().manual_seed(99))
    made = []
    for number in range(count):
        pieces = [system, torch.full((visual,), image_token)]
        supervised = [torch.zeros(SYSTEM_TOKENS + visual, dtype=torch.bool)]
        for _ in range(int(torch.randint(1, 7, (), generator=generator))):
            question = int(torch.randint(8, 25, (), generator=generator)) + ROUND_TOKENS
            answer = 1 + int(math.exp(math.log(12) + 1.2 * torch.randn((), generator=generator).item()))
            pieces.append(torch.randint(1, vocabulary, (question + answer,), generator=generator))
            supervised.append(
                torch.cat((torch.zeros(question, dtype=torch.bool), torch.ones(answer, dtype=torch.bool)))
            )
        limit = SYSTEM_TOKENS + visual + 1500
        ids, mask = torch.cat(pieces)[:limit], torch.cat(supervised)[:limit]
        made.append(Conversation(ids, torch.where(mask, ids, IGNORE), number))
    return made
