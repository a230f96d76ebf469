"""A model directory of a preset's shapes, and the same records in every trainer's format, for `scripts.benchmark peers` and `plan`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.presets import Preset, build
from visionzip.templates.llava_v1 import SYSTEM

RATE = 1e-5
"""Learning rate of every trainer."""

CHAT = (
    SYSTEM
    + " {% for message in messages %}{% if message['role'] == 'user' %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}ASSISTANT:{% else %}"
    "{% for part in message['content'] %} {{ part['text'] }} {% endfor %}</s>{% endif %}{% endfor %}"
)
"""LLaVA's conversation as a chat template."""


@dataclass(frozen=True)
class Record:
    """One image with one question and one answer, both of words that are one token each."""

    image: Path
    question: str
    answer: str


def make_tokenizer(vocabulary: int) -> Any:
    """One id for each word, so that all trainers see the same ids whatever spaces their templates write. ``<image>`` is the last id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "</s>", "<unk>", *dict.fromkeys([*SYSTEM.split(), "USER:", "ASSISTANT:"])]
    words = [*known, *(f"w{number}" for number in range(vocabulary - len(known) - 1)), "<image>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def make_model(preset: Preset, folder: Path, device: torch.device) -> None:
    """A model directory of the preset's shapes: random weights (drawn on `device`), processor, chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    model = build(preset, device)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    side = preset.vision["image_size"]
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        make_tokenizer(preset.text["vocab_size"]), patch_size=preset.vision["patch_size"],
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip


def make_records(preset: Preset, folder: Path) -> list[Record]:
    """A step's records with images of noise; with the system sentence some 220 tokens of text each.

    Written into `folder`: `ours.json` (LLaVA's JSON, of which `examples/trl_sft.py` makes prompts and completions), `shared.json` with
    LLaMA-Factory's `dataset_info.json`, and ms-swift's `swift.jsonl`.
    """
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    side = preset.vision["image_size"]

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in draw.integers(0, preset.text["vocab_size"] - 64, count))

    records = []
    for number in range(preset.batch):
        path = folder / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
        question = words(int(draw.integers(40, 160)))
        records.append(Record(path, question, words(int(draw.lognormal(4.2, 0.6)) + 1)))
    written = {
        "ours.json": as_llava(records),
        "shared.json": as_sharegpt(records),
        "dataset_info.json": DATASET_INFO,
    }
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "swift.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in as_messages(records)))
    return records


def turns(record: Record) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{record.question}"}, {"from": "gpt", "value": record.answer}]


def as_llava(records: list[Record]) -> list[dict[str, Any]]:
    """LLaVA's JSON, which `train.py` and `examples/trl_sft.py` read."""
    return [{"id": r.image.stem, "image": r.image.name, "conversations": turns(r)} for r in records]


def as_sharegpt(records: list[Record]) -> list[dict[str, Any]]:
    """LLaMA-Factory's `sharegpt` formatting, described by `DATASET_INFO`."""
    return [{"conversations": turns(r), "images": [str(r.image)]} for r in records]


def as_messages(records: list[Record]) -> list[dict[str, Any]]:
    """ms-swift's messages; ``<image>`` stands where the image does."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"<image>{r.question}"},
                {"role": "assistant", "content": r.answer},
            ],
            "images": [str(r.image)],
        }
        for r in records
    ]


DATASET_INFO = {
    "records": {
        "file_name": "shared.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
    }
}


def our_config(
    preset: Preset,
    model: Path,
    records: Path,
    out: Path,
    steps: int,
    budget: dict[str, int],
    cache: Path | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """The config of our run on these records: `budget` is its `zip` section, `cache` a token cache, `compiled` means whole layers."""
    return {
        "output_dir": str(out), "zip": budget,
        "model": {
            "path": str(model), "dtype": str(preset.dtype).removeprefix("torch."), "attn_implementation": "eager" if compiled else None,
        },
        "data": {
            "sources": [{"path": str(records / "ours.json"), "images": str(records)}], "template": "llava_v1", "max_length": 4096,
            "cache": None if cache is None else str(cache), "cache_dir": str(records / "index"),
        },
        "trainer": {
            "deepspeed": "off", "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_steps": steps,
            "per_device_train_batch_size": preset.batch, "global_batch_size": preset.batch, "logging_steps": 1,
            "save_strategy": "no", "dataloader_num_workers": 0, "torch_compile": compiled,
        },
        "wandb": {"enabled": False}, "report": {"enabled": False},
    }  # fmt: skip
