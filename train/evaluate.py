"""Answers held-out questions and scores them, shared over all processes.

    python -m train.evaluate --config configs/tiny-llava/demo.yaml model.projector=runs/demo/projector

compares full tokens, training-free compression and the projector that `model.projector` names, in one table by question type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from data.cache.reader import VISUAL, VISUAL_VIDEO, CachedPictures
from data.collate import TEXT_KEYS
from data.config import DataConfig
from data.pictures import PixelPictures
from data.processes import own_device
from data.questions import Question, QuestionCollator, build_questions
from train import random_state
from train.config import EvalSection, RunConfig
from visionzip import Attachment, attached
from visionzip.fingerprint import gathered

LABELS = {"full": "full tokens", "training_free": "training-free", "fine_tuned": "fine-tuned"}
ALL = "all"
PICTURES_COUNTED = 200
"""Pictures whose tokens are counted for a mean."""


@dataclass
class Scores:
    """Exact match of one model. `types`: type → (right, asked). `answers`: one dict a question, in the file's order."""

    types: dict[str, tuple[int, int]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    unread: int = 0

    @property
    def accuracy(self) -> float:
        right, asked = (sum(column) for column in zip(*self.types.values(), strict=True)) if self.types else (0, 0)
        return right / asked if asked else 0.0

    @property
    def questions(self) -> int:
        return sum(asked for _, asked in self.types.values())


def normalise(text: str) -> str:
    """Case, spaces and a final full stop do not count."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().casefold()


def questions_of(config: RunConfig, processor: Any, cached: bool = False) -> Any:
    """The held-out questions, laid out by the template of training. The processor's state decides the placeholders.

    Args:
        cached: pictures are visual tokens out of `eval.cache`, where there is one.

    Raises:
        ValueError: without an eval section, or when it leads to no question at all.
    """
    if config.eval is None:
        raise ValueError("there is no eval section in this config; add eval.sources")
    data = DataConfig.model_validate(
        {**config.data.model_dump(), "sources": [s.model_dump() for s in config.eval.sources]}
    )
    tokens = CachedPictures(config.eval.cache, data.frames) if cached and config.eval.cache is not None else None
    pictures = tokens or PixelPictures(data, processor)
    questions = build_questions(data, processor, config.eval.max_questions, pictures)
    if not len(questions):
        raise ValueError(
            f"eval.sources hold no question that can be asked ({len(questions.rejections)} records rejected)"
        )
    return questions


def picture_inputs(question: Question) -> dict[str, Any]:
    """What ``forward`` takes for the question's pictures: its inputs without the text."""
    return {key: value for key, value in question.inputs.items() if key not in TEXT_KEYS}


def one_a_picture(questions: Sequence[Any], count: int) -> list[Question]:
    """The first question of each of the first `count` records that have pictures and can be read."""
    chosen: list[Question] = []
    seen: set[str] = set()
    for number in range(len(questions)):
        question = questions[number]
        if len(chosen) == count:
            break
        record = getattr(question, "id", "").rsplit("/", 1)[0]
        if isinstance(question, Question) and record not in seen and picture_inputs(question):
            seen.add(record)
            chosen.append(question)
    return chosen


def score(
    model: Any,
    processor: Any,
    config: RunConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    beat: Callable[[str], None] = lambda doing: None,
    bar: Callable[[int, int], None] = lambda done, of: None,
) -> Scores:
    """Every question answered greedily by exactly one process, the result known to all of them. Collective."""
    assert config.eval is not None
    questions = Numbered(questions_of(config, processor, cached=attached(model) is not None), rank, world_size)
    loader = DataLoader(questions, batch_size=config.eval.batch_size, collate_fn=NumberedCollator(processor))
    answered: dict[int, dict[str, Any] | None] = {}
    training = model.training
    model.eval()
    last: dict[str, Any] = {}
    bar(0, len(loader))
    with torch.no_grad(), random_state.untouched():
        for done, batch in enumerate(loader, start=1):
            last = batch["inputs"] or last  # under ZeRO-3 every process has to run the model as often as the others
            texts = generate(model, processor, last, config.eval) if last else []
            answered |= dict.fromkeys(batch["numbers"])
            answered |= {n: record(q, text) for (n, q), text in zip(batch["asked"], texts, strict=False)}
            beat(f"answering held-out questions, batch {done} of {len(loader)}")
            bar(done, len(loader))
    model.train(training)
    return gather(answered, world_size)


class Numbered(Dataset):
    """The questions one process answers, with their numbers. All shares are equally long: the last question may be asked
    more than once, and counts once."""

    def __init__(self, questions: Any, rank: int, world_size: int) -> None:
        self.questions = questions
        rounds = -(-len(questions) // world_size)
        self.share = [min(rank + turn * world_size, len(questions) - 1) for turn in range(rounds)]

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, place: int) -> tuple[int, Any]:
        return self.share[place], self.questions[self.share[place]]


class NumberedCollator:
    """`inputs` for `generate`, `asked`: (number, question) of its rows, `numbers`: of all, unreadable ones too."""

    def __init__(self, processor: Any) -> None:
        self.collate = QuestionCollator(processor)

    def __call__(self, items: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        return {
            "inputs": self.collate([question for _, question in items])["inputs"],
            "asked": [(number, question) for number, question in items if isinstance(question, Question)],
            "numbers": [number for number, _ in items],
        }


def generate(model: Any, processor: Any, inputs: dict[str, Any], section: EvalSection) -> list[str]:
    tokenizer = getattr(processor, "tokenizer", processor)
    moved: dict[str, Any] = on_device(inputs, model.device, model.dtype)
    cached = {kind: moved.pop(name) for kind, name in (("image", VISUAL), ("video", VISUAL_VIDEO)) if name in moved}
    for kind, pictures in cached.items():
        outputs = attached(model).encoder_outputs(pictures, kind)  # type: ignore[union-attr]
        moved["mm_encoder_outputs"] = {**moved.get("mm_encoder_outputs", {}), **outputs}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **moved, max_new_tokens=section.max_new_tokens, do_sample=False, use_cache=True, pad_token_id=pad
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def on_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """`value` with all tensors in it, in lists and dicts too, on `device`; floating-point ones in `dtype`."""
    if isinstance(value, dict):
        return {key: on_device(inner, device, dtype) for key, inner in value.items()}
    if isinstance(value, list):
        return [on_device(inner, device, dtype) for inner in value]
    return value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value


def record(question: Any, text: str) -> dict[str, Any]:
    return {
        "id": question.id,
        "type": question.type or ALL,
        "question": question.question,
        "expected": question.answer,
        "answer": text.strip(),
        "right": normalise(text) == normalise(question.answer),
    }


def gather(answered: dict[int, dict[str, Any] | None], world_size: int) -> Scores:
    parts: list[Any] = [answered]
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, answered)
    everything = {number: row for part in parts for number, row in part.items()}
    scores = Scores(unread=sum(row is None for row in everything.values()))
    for number in sorted(everything):
        row = everything[number]
        if row is not None:
            scores.answers.append(row)
            right, asked = scores.types.get(row["type"], (0, 0))
            scores.types[row["type"]] = (right + row["right"], asked + 1)
    return scores


def table(results: dict[str, Scores], tokens: int, of_tokens: int) -> str:
    """One row a model, one column a question type, as Markdown."""
    names = [name for name in LABELS if name in results]
    types = sorted({kind for name in names for kind in results[name].types} - {ALL})
    head = ["model", "tokens", *types, "all"]
    rows = [
        [
            LABELS[name],
            str(of_tokens if name == "full" else tokens),
            *(percent(*results[name].types.get(kind, (0, 0))) for kind in types),
            f"{100 * results[name].accuracy:.1f} %",
        ]
        for name in names
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def percent(right: int, asked: int) -> str:
    return f"{100 * right / asked:.1f} %" if asked else ""


def won_back(results: dict[str, Scores]) -> str:
    """What compression cost, and how much of it fine-tuning won back, in words."""
    if not {"full", "training_free", "fine_tuned"} <= set(results):
        return ""
    full, free, tuned = (results[name].accuracy for name in ("full", "training_free", "fine_tuned"))
    lost, back = 100 * (full - free), 100 * (tuned - free)
    share = f": {back / lost:.0%} of it" if lost > 0 else ""
    return f"Compression cost {lost:.1f} points; fine-tuning the projector won {back:.1f} back{share}."


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m train.evaluate --config … key=value …`; several processes under `torchrun -m train.evaluate`."""
    from train.cli import parse_arguments, run_guarded

    options = parse_arguments(arguments, program="python -m train.evaluate", about=__doc__ or "")
    return run_guarded(lambda: evaluate_only(options))


def evaluate_only(options: Any) -> int:
    from train.build import build_model
    from train.cli import read_config
    from train.launch import prepare_environment, quiet
    from visionzip import detach
    from visionzip.export import load_into
    from visionzip.projector import projector_state

    world_size = prepare_environment()
    config = read_config(options)
    rank = int(torch.distributed.get_rank()) if dist.is_initialized() else 0
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")  # what is gathered are answers, which lie in memory
        rank = dist.get_rank()
    quiet(rank)
    device = own_device()
    start = config.model.projector
    model, processor = build_model(
        config.model_copy(update={"model": config.model.model_copy(update={"projector": None})})
    )
    model.to(device)
    tokens, of_tokens = tokens_a_picture(model, processor, config)
    results = {"training_free": score(model, processor, config, rank=rank, world_size=world_size)}
    before = projector_state(model)
    if start is not None:
        load_into(model, start, force=config.model.force_projector)
        results["fine_tuned"] = score(model, processor, config, rank=rank, world_size=world_size)
        model.load_state_dict(before, strict=False)
    assert attached(model) is not None
    detach(model)
    results["full"] = score(model, processor, config, rank=rank, world_size=world_size)
    if rank == 0:
        print(table(results, tokens, of_tokens))
        print(json.dumps({name: round(scores.accuracy, 4) for name, scores in results.items()}))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def tokens_a_picture(model: Any, processor: Any, config: RunConfig) -> tuple[int, int]:
    """(tokens now, tokens of the untouched model) of the first picture that is asked about; 0 where there is none.

    With budgets of each picture's own their mean over the first `PICTURES_COUNTED`.
    """
    attachment = attached(model)
    assert attachment is not None
    questions = questions_of(config, processor)
    if attachment.config.adaptive is not None:
        counted = counts(attachment, [picture_inputs(each) for each in one_a_picture(questions, PICTURES_COUNTED)])
        stock, now = (
            (sum(column) / max(len(counted), 1) for column in zip(*counted, strict=True)) if counted else (0, 0)
        )
        return round(now), round(stock)
    for number in range(min(len(questions), 20)):
        question = questions[number]
        if isinstance(question, Question) and (pictures := picture_inputs(question)):
            stock, now = attachment.token_counts(**pictures)[0]
            return now, stock
    return 0, 0


def counts(attachment: Attachment, pictures: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """`Attachment.token_counts` of each of `pictures`, where the encoder has to look at them, before a trainer has placed the model:
    on this process's GPU, and under ZeRO-3, where all processes must call this, with whole weights."""
    tower = attachment.model.get_submodule(attachment.family.tower)
    if not any(hasattr(weight, "ds_id") for weight in tower.parameters()):
        tower.to(own_device())
    weights = list(tower.parameters())
    with gathered(weights):
        device = weights[0].device
        return [count for each in pictures for count in attachment.token_counts(**on_device(each, device))]


if __name__ == "__main__":
    raise SystemExit(main())
