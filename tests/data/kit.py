"""Processors and files the data tests share. Everything is made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.config import DataConfig
from data.dataset import InstructionDataset, build_dataset
from tests.tiny import REFERENCE

LABELS = REFERENCE / "llava_v1_labels"

# How llava-hf/llava-1.5 writes a conversation: images of a turn first, no token behind an answer.
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# ChatML, as Qwen and many others write it, with a default system message.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><image><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 3's way: texts are trimmed.
TRIMMING = (
    "{% for message in messages %}<|start|>{{ message['role'] }}<|end|>\n\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
TEMPLATES = {"llava": LLAVA_CHAT, "chatml": CHATML, "trimming": TRIMMING}


def llama_tokenizer() -> Any:
    """The SentencePiece tokenizer of the golden cases, with an `<image>` token."""
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(LABELS, legacy=False, add_bos_token=True, pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@cache
def _bytelevel() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = ["What colour is the bus?\nRed. The answer is on the sign. system user assistant Be brief."] * 3
    backend.train_from_iterator(text, trainer)
    return backend.to_str()


def bytelevel_tokenizer() -> Any:
    """A byte-level BPE tokenizer with ChatML's and Llama 3's control tokens, and no BOS."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bytelevel()), eos_token="<|im_end|>", pad_token="<pad>"
    )
    control = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<image>", "<|start|>", "<|end|>", "<|eot|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    return tokenizer


def processor(template: str = "llava", tokenizer: Any = None, image: int = 32, patch: int = 8, **changes: Any) -> Any:
    """A LLaVA processor: 16 placeholders an image."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    if tokenizer is None:
        tokenizer = llama_tokenizer() if template == "llava" else bytelevel_tokenizer()
    images = CLIPImageProcessor(size={"shortest_edge": image}, crop_size={"height": image, "width": image}, **changes)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[template],
    )


PLACEHOLDERS = 16


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> str:
    """Noise; returns the file's name."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.name


def record(
    number: int, image: str | None = None, question: str = "What is it?", answer: str = "A cat."
) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"r{number}"}
    if image is not None:
        row["image"] = image
        question = f"<image>\n{question}"
    row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return row


def text_records(count: int) -> list[dict[str, Any]]:
    return [record(number, question=f"Number {number}?", answer=f"It is {number}.") for number in range(count)]


def write_json(path: Path, rows: list[Any], lines: bool = False) -> str:
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def data_config(folder: Path, *sources: Any, **changes: Any) -> DataConfig:
    """A config whose sources are paths or dicts; indexes go to `folder/cache`."""
    listed = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    return DataConfig.model_validate(
        {"sources": listed, "template": "llava_v1", "cache_dir": str(folder / "cache"), **changes}
    )


def dataset(folder: Path, *sources: Any, seed: int = 0, using: Any = None, **changes: Any) -> InstructionDataset:
    return build_dataset(data_config(folder, *sources, **changes), using or processor(), seed)
