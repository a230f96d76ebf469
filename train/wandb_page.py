"""What a run puts on its W&B page besides curves: images with the kept patches and the model's answers while it learns, a table of
every prediction, accuracy bars.

A saved layout can't be written from here: W&B keeps layouts on its server. Names group the page instead: keys with one prefix are one
section.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from data.questions import Question, QuestionCollator
from train import random_state
from train.config import EvalSection
from train.held_out import generate_answers, image_inputs, one_question_per_image
from train.metrics import METRICS
from train.scores import ALL, LABELS, Scores
from visionzip import attached

logger = logging.getLogger(__name__)

TIMES = 10
"""How often a run shows its fixed questions, unless the config says otherwise."""


def build_predictions(wandb: Any, scores: dict[str, Scores]) -> Any:
    """One row a question: what was asked and expected, and what each model answered."""
    names = [name for name in LABELS if name in scores]
    said = {name: {row["id"]: row for row in scores[name].answers} for name in names}
    table = wandb.Table(
        columns=["question id", "type", "question", "expected", *(LABELS[name] for name in names), "right"]
    )
    for row in scores[names[-1]].answers if names else ():
        answers = [said[name].get(row["id"], {}) for name in names]
        right = ", ".join(LABELS[name] for name, one in zip(names, answers, strict=True) if one.get("right")) or "none"
        table.add_data(
            row["id"], row["type"], row["question"], row["expected"], *(one.get("answer", "") for one in answers), right
        )
    return table


def build_accuracy_bars(wandb: Any, scores: dict[str, Scores], tokens: int, of_tokens: int) -> dict[str, Any]:
    """Accuracy of each model, in all and for each type of question, as bars."""
    names = [name for name in LABELS if name in scores]
    kinds = sorted({kind for name in names for kind in scores[name].types} - {ALL})
    drawn = {"eval/accuracy": [(name, scores[name].accuracy) for name in names]}
    for kind in kinds if len(kinds) > 1 else ():
        pairs = [(name, scores[name].types.get(kind, (0, 0))) for name in names]
        drawn[f"eval/accuracy by type/{kind}"] = [
            (name, right / asked if asked else 0.0) for name, (right, asked) in pairs
        ]
    made = {}
    for key, rows in drawn.items():
        label = {name: f"{LABELS[name]} ({of_tokens if name == 'full' else tokens} tokens)" for name in names}
        table = wandb.Table(
            columns=["model", "exact match, %"], data=[[label[name], 100 * value] for name, value in rows]
        )
        title = "Held-out questions" + (f": {key.rsplit('/', 1)[1]}" if key.count("/") > 1 else "")
        made[key] = wandb.plot.bar(table, "model", "exact match, %", title=title)
    return made


def build_final_page(wandb: Any, scores: dict[str, Scores], tokens: int, of_tokens: int) -> dict[str, Any]:
    """Everything the evaluation gives to the page."""
    if not scores:
        return {}
    return {
        "predictions/held-out": build_predictions(wandb, scores),
        **build_accuracy_bars(wandb, scores, tokens, of_tokens),
    }


class ShowAnswers(TrainerCallback):
    """A few fixed held-out questions, every so often: their images with the kept patches, and the model's current answers.

    On rank 0 alone, so not under ZeRO-3, where no rank has whole weights. The random state of training is left as it was; a failure
    here ends these pages, never the run.
    """

    def __init__(
        self,
        log: Callable[[Callable[[Any], dict[str, Any]]], None],
        questions: Callable[[], Sequence[Any]],
        processor: Any,
        section: EvalSection,
        count: int = 4,
        every: int | None = None,
    ) -> None:
        self.log, self.questions, self.processor, self.section = log, questions, processor, section
        self.count, self.every = count, every
        self.chosen: list[Question] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        every = self.every if self.every is not None else max(1, state.max_steps // TIMES)
        if state.is_world_process_zero and self.count and every and state.global_step % every == 0:
            self.show(model, state.global_step)

    def show(self, model: Any, step: int) -> None:
        try:
            with torch.no_grad(), random_state.preserve():
                if self.chosen is None:
                    self.chosen = one_question_per_image(self.questions(), self.count)
                shown = [(question, *self.answer(model, question)) for question in self.chosen]
        except Exception as error:
            logger.warning("no more images for W&B (%s: %s); the run continues", type(error).__name__, error)
            self.count = 0
            return
        self.log(lambda wandb: build_answers_page(wandb, shown, step, self.section.metric))

    def answer(self, model: Any, question: Question) -> tuple[str, Any]:
        """The model's answer now, and a drawing of what is kept of the (last) image; None without pixels."""
        from visionzip.analysis import draw
        from visionzip.analysis.trace import trace_inputs
        from visionzip.analysis.visualize import describe_tile, draw_views

        attachment = attached(model)
        training = model.training
        model.eval()
        try:
            (text,) = generate_answers(
                model, self.processor, QuestionCollator(self.processor)([question])["inputs"], self.section
            )
            images = image_inputs(question)
            drawn = None
            if attachment is not None and attachment.family.count_images(images):
                tile = trace_inputs(attachment, self.processor, images).tiles[-1]
                drawn = draw.draw_panel(draw_views(tile, 280), note=describe_tile(tile))
        finally:
            model.train(training)
        return text.strip(), drawn


def build_answers_page(wandb: Any, shown: list[tuple[Question, str, Any]], step: int, metric: str) -> dict[str, Any]:
    """Images with question, expected and given answer below, and how many answers are right."""
    table = wandb.Table(columns=["step", "question", "expected", "answered", "right"])
    values: dict[str, Any] = {"train/global_step": step}
    right = 0.0
    for place, (question, text, drawn) in enumerate(shown):
        hit = METRICS[metric](text, question.answer)
        right += hit
        table.add_data(step, question.question, question.answer, text, hit)
        if drawn is not None:
            caption = f"step {step} · asked: {question.question} · expected: {question.answer} · answered: {text}"
            values[f"samples/{place + 1}"] = wandb.Image(drawn, caption=caption)
    if shown:
        values |= {"samples/answers": table, "samples/right, %": 100 * right / len(shown)}
    return values
