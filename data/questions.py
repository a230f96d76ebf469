"""Each question of each record asked on its own, for scoring generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.collate import text_item
from data.config import DataConfig
from data.dataset import InstructionDataset, check_images, too_long
from data.images import LoadImages
from data.sample import NO_SAMPLE, NO_SAMPLE_INDEX, Message, NoSample, Reject, Rejection, Sample, Slot
from visionzip.inputs import batch_prompts


@dataclass(frozen=True, slots=True)
class Question:
    """`inputs`: `input_ids (L,)` up to where the answer begins, and the image inputs of the model's forward."""

    id: str
    source: str
    type: str
    question: str
    answer: str
    inputs: dict[str, Any]


class Questions(Sequence):
    """All question rounds of a data set. `questions[i]` reads the images of one: a `Question`, or a `Rejection`.

    `rejections` are the records that could not even be parsed; they have no questions here.
    """

    def __init__(self, dataset: InstructionDataset, limit: int | None = None) -> None:
        self.dataset = dataset
        self.rejections: list[Rejection] = []
        self.rounds: list[tuple[int, int]] = []
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            if isinstance(sample, Rejection):
                self.rejections.append(sample)
                continue
            answers = sum(message.role == "assistant" for message in sample.messages)
            self.rounds += [(index, number) for number in range(answers)]
            if limit is not None and len(self.rounds) >= limit:
                del self.rounds[limit:]
                break

    def __len__(self) -> int:
        return len(self.rounds)

    def __getitem__(self, number: Any) -> Question | Rejection | NoSample:  # type: ignore[override]
        if number == NO_SAMPLE_INDEX:
            return NO_SAMPLE
        index, turn = self.rounds[number]
        sample = self.dataset.sample(index)
        if isinstance(sample, Rejection):
            return sample
        return self.dataset.guarded(index, sample, lambda sample: self._ask(sample, turn))

    def _ask(self, sample: Sample, turn: int) -> Question:
        encoder = self.dataset.encoder
        alone = single_round(sample, turn)
        images = encoder.images(alone)
        prompt = alone.messages[:-1]
        encoded = encoder.template.encode_spans(
            encoder.template.spans(prompt, generation=True), images.placeholders, encoder.max_length
        )
        check_images(encoded, len(alone.media))
        if len(encoded.input_ids) > encoder.max_length:
            raise Reject("too long", too_long(encoded, len(encoded.input_ids), encoder.max_length))
        return Question(
            id=f"{sample.id}/{turn}",
            source=sample.source,
            type=sample.types[turn] if sample.types else "",
            question=prompt[-1].text.strip(),
            answer=alone.messages[-1].text.strip(),
            inputs={**text_item(encoder.processor, encoded.input_ids, None), **images.inputs},
        )


def single_round(sample: Sample, turn: int) -> Sample:
    """Question and answer number `turn` alone, with all images shown so far before the question."""
    system = [message for message in sample.messages if message.role == "system"]
    rounds = [message for message in sample.messages if message.role != "system"]
    question, answer = rounds[2 * turn : 2 * turn + 2]
    earlier: list[str | Slot] = [slot for message in rounds[: 2 * turn] for slot in message.slots]
    parts = list(question.parts)
    if earlier and parts and isinstance(parts[0], str):
        parts[0] = "\n" + parts[0]
    shown = len(earlier) + len(question.slots)
    return replace(sample, messages=[*system, Message("user", [*earlier, *parts]), answer], media=sample.media[:shown])


class QuestionCollator:
    """Prompts padded on the left for `generate`: `inputs`, a dict for the model, and the `questions` of its rows in order.

    `rejections` lists questions whose images could not be read, as dicts; `inputs` is empty where nothing is left.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, items: Sequence[Question | Rejection | NoSample]) -> dict[str, Any]:
        questions = [item for item in items if isinstance(item, Question)]
        inputs = batch_prompts(self.processor, [question.inputs for question in questions]) if questions else {}
        rejections = [item.as_dict() for item in items if isinstance(item, Rejection)]
        return {"inputs": inputs, "questions": questions, "rejections": rejections}


def build_questions(
    config: DataConfig, processor: Any, limit: int | None = None, images: LoadImages | None = None
) -> Questions:
    """The questions of a data config, `limit` of them at most. Sources, templates and lengths are those of training."""
    return Questions(InstructionDataset(config, processor, seed=0, images=images), limit)
