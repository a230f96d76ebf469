"""Each round asked on its own, with its image, ready for `generate`."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from data.questions import Question, QuestionCollator, build_questions
from data.sample import NO_SAMPLE, Rejection
from tests.data import kit


@pytest.fixture
def questions(tmp_path):
    kit.write_image(tmp_path / "a.png")
    kit.write_image(tmp_path / "b.png", seed=1)
    rounds = [("human", "<image>\nWhat colour?"), ("gpt", "Red."), ("human", "How many?"), ("gpt", "2")]
    rows = [
        {
            "id": "p",
            "image": "a.png",
            "types": ["colour", "count"],
            "conversations": [{"from": who, "value": text} for who, text in rounds],
        },
        kit.record(1, question="Why?", answer="So."),
        {"id": "gone", **kit.record(2, "absent.png")},
        {"id": "bad", "conversations": []},
        {
            "id": "two",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": who, "value": text}
                for who, text in [("human", "<image>"), ("gpt", "Yes."), ("human", "And <image>?"), ("gpt", "No.")]
            ],
        },
    ]
    config = kit.data_config(tmp_path, kit.write_json(tmp_path / "a.json", rows))
    return build_questions(config, kit.processor())


def test_every_round_is_a_question(questions):
    assert len(questions) == 6
    assert [rejection.reason for rejection in questions.rejections] == ["empty conversation"]
    first, second, third = questions[0], questions[1], questions[2]
    assert (first.id, first.type, first.question, first.answer) == ("p/0", "colour", "What colour?", "Red.")
    assert (second.id, second.type, second.question, second.answer) == ("p/1", "count", "How many?", "2")
    assert (third.type, third.source) == ("", "a")
    assert torch.equal(first.inputs["pixel_values"], second.inputs["pixel_values"])
    assert "pixel_values" not in third.inputs


def test_a_later_round_reads_as_if_it_were_the_first(questions):
    """No earlier answer is given away, and the image stands in front of the question."""
    tokenizer = questions.dataset.encoder.processor.tokenizer
    text = tokenizer.decode(questions[1].inputs["input_ids"])
    assert "Red" not in text
    assert "What colour" not in text
    asked = text.replace("<image>", "").replace(" ", "")
    assert asked.endswith("USER:\nHowmany?ASSISTANT:")


def test_images_shown_before_are_shown_again(questions):
    image = questions.dataset.encoder.processor.tokenizer.convert_tokens_to_ids("<image>")
    counts = [int((questions[n].inputs["input_ids"] == image).sum()) // kit.PLACEHOLDERS for n in (4, 5)]
    assert counts == [1, 2]
    assert questions[5].inputs["pixel_values"].shape[0] == 2


def test_an_image_that_cant_be_read_is_a_rejection(questions):
    assert isinstance(questions[3], Rejection)
    assert questions[3].reason == "file missing"


def test_batches_are_padded_on_the_left(questions):
    items = [questions[0], questions[3], questions[2], NO_SAMPLE]
    batch = QuestionCollator(questions.dataset.encoder.processor)(items)
    asked, inputs = batch["questions"], batch["inputs"]
    assert [question.id for question in asked] == ["p/0", "r1/0"]
    assert [rejection["reason"] for rejection in batch["rejections"]] == ["file missing"]
    length = inputs["input_ids"].shape[1]
    for row, question in enumerate(asked):
        used = len(question.inputs["input_ids"])
        assert inputs["input_ids"][row, length - used :].tolist() == question.inputs["input_ids"].tolist()
        assert inputs["attention_mask"][row].tolist() == [0] * (length - used) + [1] * used
    assert inputs["pixel_values"].shape[0] == 1
    assert QuestionCollator(questions.dataset.encoder.processor)([questions[3]])["inputs"] == {}


def test_through_workers_and_with_a_limit(questions):
    loader = DataLoader(
        questions, batch_size=2, num_workers=2, collate_fn=QuestionCollator(questions.dataset.encoder.processor)
    )
    names = [question.id for batch in loader for question in batch["questions"]]
    assert names == [item.id for item in (questions[n] for n in range(6)) if isinstance(item, Question)]
    limited = build_questions(questions.dataset.config, kit.processor(), limit=3)
    assert [limited[n].id for n in range(len(limited))] == ["p/0", "p/1", "r1/0"]


def test_the_prompt_is_that_of_training(questions):
    """Up to the answer the ids are those the model was trained on."""
    data = questions.dataset
    trained = data[0]["input_ids"].tolist()
    asked = questions[0].inputs["input_ids"].tolist()
    assert trained[: len(asked)] == asked
