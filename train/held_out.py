"""Asks a model the held-out questions, shared over all processes. Scores: `train.scores`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from data.cache.reader import VISUAL, VISUAL_VIDEO, CachedTokens
from data.collate import TEXT_KEYS
from data.config import DataConfig
from data.elastic import Budget
from data.images import PixelImages
from data.questions import Question, QuestionCollator, build_questions
from train import random_state
from train.config import EvalSection, RunConfig
from train.metrics import METRICS
from train.scores import ALL, Scores, runs_on
from visionzip import attached, set_budget
from visionzip.budgets import ladder
from visionzip.words import count_of


def load_questions(config: RunConfig, processor: Any, cached: bool = False, budget: Budget | None = None) -> Any:
    """The held-out questions in the template of training. An attached processor makes placeholders for the budget, a plain one for all tokens.

    Args:
        cached: read visual tokens from `eval.cache`, where it is set, in place of images.
        budget: the one that a cache for several is read at; None: the config's.

    Raises:
        ValueError: there is no eval section, or its sources have no usable question.
    """
    if config.eval is None:
        raise ValueError("there is no eval section in this config; add eval.sources")
    data = DataConfig.model_validate(
        {**config.data.model_dump(), "sources": [s.model_dump() for s in config.eval.sources]}
    )
    budget = budget or (config.zip.dominant, config.zip.contextual)
    tokens = CachedTokens(config.eval.cache, data.frames, budget) if cached and config.eval.cache is not None else None
    images = tokens or PixelImages(data, processor)
    questions = build_questions(data, processor, config.eval.max_questions, images)
    if not len(questions):
        raise ValueError(
            f"eval.sources have no usable question ({count_of(len(questions.rejections), 'record')} rejected)"
        )
    return questions


def image_inputs(question: Question) -> dict[str, Any]:
    """The image inputs of ``forward``: a question's inputs without the text."""
    return {key: value for key, value in question.inputs.items() if key not in TEXT_KEYS}


def one_question_per_image(questions: Sequence[Any], count: int) -> list[Question]:
    """The first question of each of the first `count` usable records with images."""
    chosen: list[Question] = []
    seen: set[str] = set()
    for number in range(len(questions)):
        question = questions[number]
        if len(chosen) == count:
            break
        record = getattr(question, "id", "").rsplit("/", 1)[0]
        if isinstance(question, Question) and record not in seen and image_inputs(question):
            seen.add(record)
            chosen.append(question)
    return chosen


def score_model(
    model: Any,
    processor: Any,
    config: RunConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    beat: Callable[[str], None] = lambda doing: None,
    bar: Callable[[int, int], None] = lambda done, of: None,
) -> Scores:
    """Answer every question greedily, each on one process; all processes get the scores. Collective.

    A compressed model reads `eval.cache`, where there is one and it has the current budget.
    """
    assert config.eval is not None
    attachment = attached(model)
    budget = None if attachment is None else (attachment.config.dominant, attachment.config.contextual)
    stored = {*ladder(config.zip), (config.zip.dominant, config.zip.contextual)}  # what `eval.cache` has
    asked_of = load_questions(config, processor, cached=budget in stored, budget=budget)
    return score_questions(
        model, processor, asked_of, config.eval, rank=rank, world_size=world_size, beat=beat, bar=bar
    )


def score_questions(
    model: Any,
    processor: Any,
    questions: Any,
    section: EvalSection,
    *,
    rank: int = 0,
    world_size: int = 1,
    beat: Callable[[str], None] = lambda doing: None,
    bar: Callable[[int, int], None] = lambda done, of: None,
) -> Scores:
    """`score_model` on `questions` that are loaded already, as the model is: with its current budget. Collective."""
    share = NumberedQuestions(questions, rank, world_size)
    loader = DataLoader(share, batch_size=section.batch_size, collate_fn=NumberedCollator(processor))
    answered: dict[int, dict[str, Any] | None] = {}
    training = model.training
    model.eval()
    last: dict[str, Any] = {}
    bar(0, len(loader))
    with torch.no_grad(), random_state.preserve():
        for done, batch in enumerate(loader, start=1):
            last = batch["inputs"] or last  # under ZeRO-3 every process has to run the model as often as the others
            texts = generate_answers(model, processor, last, section) if last else []
            answered |= dict.fromkeys(batch["numbers"])
            asked = zip(batch["asked"], texts, strict=False)
            answered |= {number: score_answer(question, text, section.metric) for (number, question), text in asked}
            beat(f"answering held-out questions, batch {done} of {len(loader)}")
            bar(done, len(loader))
    model.train(training)
    return merge_answers(answered, world_size)


def score_at_budgets(
    model: Any, name: str, budgets: Sequence[Any] | None, ask: Callable[[str], Scores]
) -> dict[str, Scores]:
    """`model` under each of `budgets` (`eval.budgets`), as ``"fine_tuned@8"``; its own budget is restored afterwards. Collective.

    Args:
        ask: a budget in words → its scores.

    Raises:
        ValueError: for a budget that the encoder can't meet, before anything is asked.
    """
    attachment = attached(model)
    assert attachment is not None
    own, found = attachment.config, {}
    try:
        for budget in budgets or ():
            set_budget(model, budget)
        for budget in budgets or ():
            set_budget(model, budget)
            found[f"{name}@{budget}"] = ask(f"budget {budget}")
    finally:
        set_budget(model, own)
    return found


class NumberedQuestions(Dataset):
    """One process's share of the questions, with their numbers. All shares have the same length: the last question may be asked
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
    """`inputs` for `generate_answers`; `asked`: (number, question) for each of its rows; `numbers`: of all questions, rejected ones included."""

    def __init__(self, processor: Any) -> None:
        self.collate = QuestionCollator(processor)

    def __call__(self, items: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        return {
            "inputs": self.collate([question for _, question in items])["inputs"],
            "asked": [(number, question) for number, question in items if isinstance(question, Question)],
            "numbers": [number for number, _ in items],
        }


def generate_answers(model: Any, processor: Any, inputs: dict[str, Any], section: EvalSection) -> list[str]:
    tokenizer = getattr(processor, "tokenizer", processor)
    moved: dict[str, Any] = on_device(inputs, model.device, model.dtype)
    cached = {kind: moved.pop(name) for kind, name in (("image", VISUAL), ("video", VISUAL_VIDEO)) if name in moved}
    for kind, images in cached.items():
        outputs = attached(model).encoder_outputs(images, kind)  # type: ignore[union-attr]
        moved["mm_encoder_outputs"] = {**moved.get("mm_encoder_outputs", {}), **outputs}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **moved, max_new_tokens=section.max_new_tokens, do_sample=False, use_cache=True, pad_token_id=pad
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def on_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """`value` with its tensors, also those in lists and dicts, on `device`; floating-point ones in `dtype`."""
    if isinstance(value, dict):
        return {key: on_device(inner, device, dtype) for key, inner in value.items()}
    if isinstance(value, list):
        return [on_device(inner, device, dtype) for inner in value]
    return value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value


def score_answer(question: Any, text: str, metric: str) -> dict[str, Any]:
    """A row of `Scores.answers`; `right` is what the answer is worth."""
    worth = METRICS[metric](text, question.answer)
    return {
        "id": question.id,
        "type": question.type or ALL,
        "question": question.question,
        "expected": question.answer,
        "answer": text.strip(),
        "right": worth,
        "ran_on": not worth and runs_on(text, question.answer),
    }


def merge_answers(answered: dict[int, dict[str, Any] | None], world_size: int) -> Scores:
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


def tokens_per_image(model: Any, processor: Any, config: RunConfig) -> tuple[int, int]:
    """Visual tokens (compressed, full) of the first held-out image; 0 where there is none."""
    attachment = attached(model)
    assert attachment is not None
    questions = load_questions(config, processor)
    for number in range(min(len(questions), 20)):
        question = questions[number]
        if isinstance(question, Question) and (images := image_inputs(question)):
            stock, now = attachment.token_counts(**images)[0]
            return now, stock
    return 0, 0
