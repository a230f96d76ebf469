"""Held-out questions to an ONNX export and to the PyTorch model it was made of: how many answers are the same, and how many are right.

    python -m scripts.compare_device --model runs/real/model --export runs/real-onnx [--export runs/real-onnx-int8 …] \
        --data runs/real/data/eval.json --images runs/real/data/images --questions 200

Every question is asked alone, about its image, greedily. The budget is each export's default.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from scripts.bad_input import exit_code_of
from visionzip.device import DeviceModel
from visionzip.device import load as load_device

LONGEST = 16  # tokens of an answer


def questions(file: Path, count: int, seed: int = 1) -> list[tuple[str, str, str]]:
    """``(image, question, answer)``, `count` of the file's in an order that the seed decides."""
    found = []
    for record in json.loads(file.read_text()):
        turns = record["conversations"]
        for asked, said in zip(turns[::2], turns[1::2], strict=True):
            found.append((record["image"], asked["value"].replace("<image>", "").strip(), said["value"].strip()))
    random.Random(seed).shuffle(found)
    return found[:count]


def ask_pytorch(model: Any, processor: Any, image: Image.Image, question: str) -> str:
    from visionzip.chat import Chat

    chat = Chat(model, processor, max_new_tokens=LONGEST)
    chat.show(image)
    return chat.ask(question).text.strip()


def ask_device(model: DeviceModel, image: Image.Image, question: str) -> str:
    return model.ask(image, question, limit=LONGEST).text.strip()


def row(name: str, answers: list[str], reference: list[str], expected: list[str]) -> str:
    same = sum(a == b for a, b in zip(answers, reference, strict=True))
    right = sum(a == b for a, b in zip(answers, expected, strict=True))
    return f"| {name} | {same} of {len(expected)} | {100 * right / len(expected):.1f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model, or anything that was fine-tuned")
    parser.add_argument(
        "--export", action="append", required=True, type=Path, help="an ONNX export of it; can be given again"
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--questions", type=int, default=200)
    arguments = parser.parse_args()

    import visionzip
    from visionzip.config import ZipConfig

    exports = {path: load_device(path, threads=1) for path in arguments.export}
    stored = next(iter(exports.values())).package
    entry, facts = stored.budgets[stored.default], stored.facts["header"]["zip"]
    config = ZipConfig(**{**facts, "dominant": entry["dominant"], "contextual": entry["contextual"]})
    model, processor = visionzip.load(arguments.model, "cpu", "float32", config=config)
    asked = questions(arguments.data, arguments.questions)
    answers: dict[Any, list[str]] = {name: [] for name in ("PyTorch, float32", *exports)}
    for name, question, _ in asked:
        image = Image.open(arguments.images / name).convert("RGB")
        answers["PyTorch, float32"].append(ask_pytorch(model, processor, image, question))
        for path, device in exports.items():
            answers[path].append(ask_device(device, image, question))
    reference, expected = answers["PyTorch, float32"], [answer for _, _, answer in asked]
    print(f"{stored.default} visual tokens per image\n\n| | same answer as PyTorch | right |\n|---|---|---|")
    for key, said in answers.items():
        parts = exports[key].package.precision if key in exports else {}
        name = f"ONNX Runtime, vision {parts['vision']}, LLM {parts['language']}" if parts else key
        print(row(name, said, reference, expected))


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
