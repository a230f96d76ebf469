"""Accuracy on held-out questions through a running server, asked with the `openai` package: what `train.evaluate` gives for the same config.

    visionzip serve runs/real/run --name smol &
    python -m scripts.ask_server --config configs/smol-llava/ft-32.yaml --model runs/real/run/merged --name smol

Asks the questions of the config's `eval` section greedily and scores them with its metric. A prompt that the server's chat template writes
with another number of tokens than the training template is counted, since its answer need not be the same. Needs `pip install openai`.
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.questions import Question, single_round
from data.sample import Rejection, Sample
from train.config import load_config
from train.held_out import load_questions, score_answer
from visionzip.prompts import Slot


def messages_of(sample: Sample) -> list[dict[str, Any]]:
    """A sample without its answer, as the API takes it: images as ``data:`` URLs in the places of their slots."""
    found = []
    for message in sample.messages[:-1]:
        parts: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, Slot):
                parts.append({"type": "image_url", "image_url": {"url": data_url(sample.media[part.index].source)}})
            elif part.strip():
                parts.append({"type": "text", "text": part.strip()})
        found.append({"role": message.role, "content": parts})
    return found


def data_url(source: Any) -> str:
    """Of an image in a file, or of its bytes."""
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    kind = mimetypes.guess_type(str(source))[0] if isinstance(source, str) else None
    return f"data:{kind or 'image/jpeg'};base64,{base64.b64encode(content).decode()}"


def ask(client: Any, name: str, sample: Sample, tokens: int) -> tuple[str, int]:
    """The answer, and the tokens of the prompt."""
    reply = client.chat.completions.create(model=name, messages=messages_of(sample), temperature=0, max_tokens=tokens)
    return reply.choices[0].message.content or "", reply.usage.prompt_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a training config with an eval section")
    parser.add_argument(
        "--model", required=True, help="the merged directory that is served; its processor makes the prompts to compare"
    )
    parser.add_argument("--name", required=True, help="the model's name at the server")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument("--at-once", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()

    from openai import OpenAI

    from visionzip.export.merged import CompressedProcessor

    config = load_config(arguments.config, arguments.overrides)
    assert config.eval is not None
    section = config.eval
    questions = load_questions(config, CompressedProcessor.from_pretrained(arguments.model))
    client = OpenAI(base_url=arguments.url, api_key="none")

    def answer(number: int) -> tuple[dict[str, Any], bool] | None:
        question = questions[number]
        index, turn = questions.rounds[number]
        sample = questions.dataset.sample(index)
        if not isinstance(question, Question) or isinstance(sample, Rejection):
            return None
        text, length = ask(client, arguments.name, single_round(sample, turn), section.max_new_tokens)
        return score_answer(question, text, section.metric), length != len(question.inputs["input_ids"])

    with ThreadPoolExecutor(arguments.at_once) as pool:
        rows = [row for row in pool.map(answer, range(len(questions))) if row is not None]
    right = sum(row["right"] for row, _ in rows)
    print(json.dumps({
        "questions": len(rows), "right": right, "accuracy": round(right / max(1, len(rows)), 4),
        "prompts of another length": sum(other for _, other in rows),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
