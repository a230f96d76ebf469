"""Batches of real files train every family: its images' shapes, its placeholders, its token types."""

from __future__ import annotations

import pytest
import torch

from data.collate import TEXT_KEYS
from data.template import IGNORE
from tests.data import kit
from tests.families.case import Case, cases, make_image
from visionzip import attach

CASES = cases()


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def make(case: Case, folder, processor):
    """A record with one image, one with none, and one with two."""
    for number, size in enumerate([*case.sizes, case.sizes[0]][:3]):
        make_image(number, size).save(folder / f"{number}.png")
    rows = [kit.record(0, "0.png", answer="a red circle"), kit.record(1, answer="yes")]
    two = [{"from": "human", "value": "<image> is this <image> a square"}, {"from": "gpt", "value": "no"}]
    rows.append({"id": "two", "image": ["1.png", "2.png"], "conversations": two})
    return kit.dataset(folder, kit.write_json(folder / "a.json", rows), using=processor, max_length=16384)


def forward(model, batch):
    """The loss, and that placeholders and features agree: the model itself refuses where they don't."""
    assert "rejections" not in batch, batch["rejections"]
    out = model(**batch)
    assert torch.isfinite(out.logits[batch["attention_mask"].bool()]).all()
    return out.loss


def test_a_mixed_batch_goes_through_the_compressed_model(case, tmp_path):
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    data = make(case, tmp_path, processor)
    items = [data[index] for index in range(3)]
    model.train()  # some families ask for more of their inputs then
    assert torch.isfinite(forward(model, data.collator()(items)))


def test_a_batch_without_images_goes_through_with_a_blank_one(case, tmp_path):
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    data = make(case, tmp_path, processor)
    batch = data.collator()([data[1]])
    assert batch["labels"][1].eq(IGNORE).all()
    assert torch.isfinite(forward(model, batch))
    # The row beside it changes nothing for the real one.
    text = {key: batch[key][:1] for key in ("attention_mask", *TEXT_KEYS) if key in batch}
    kept = text["attention_mask"][0].bool()
    text = {key: value[:, kept] for key, value in text.items()}
    torch.testing.assert_close(forward(model, batch), model(**text).loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_items_hold_what_the_processor_gives(case, tmp_path, count):
    """The same images through the processor's own call: same inputs, same number of placeholders."""
    processor = case.processor()
    data = make(case, tmp_path, processor)
    index = {1: 0, 2: 2}[count]
    item = data[index]
    images = [data.images.prepared(media) for media in data.sample(index).media]
    inputs = case.process(processor, [case.prompt(count)], [images])
    for name, value in case.image_inputs(inputs).items():
        torch.testing.assert_close(item[name], torch.as_tensor(value))
    assert set(inputs) - {"attention_mask"} <= set(item), (
        "nothing the model is given at inference is missing in training"
    )
    token = case.config().image_token_id
    assert int((item["input_ids"] == token).sum()) == int((torch.as_tensor(inputs["input_ids"]) == token).sum()) > 0


def test_paligemma_is_trained_as_its_processor_does_it(tmp_path):
    """Ids, token types and labels are those of the processor given the answer as `suffix`."""
    case = next(case for case in CASES if case.name == "PaliGemma")
    processor = case.processor()
    make_image(0, (224, 224)).save(tmp_path / "a.png")
    path = kit.write_json(tmp_path / "a.json", [kit.record(0, "a.png", question="what is this", answer="a red circle")])
    data = kit.dataset(tmp_path, path, using=processor, template="paligemma")
    item = data[0]
    image = data.images.prepared(data.sample(0).media[0])
    # The tokenizer here has no tokens for a suffix's newline and glues no words: spaces stand where a real one has none.
    expected = processor(text="<image> what is this", images=image, suffix=" a red circle ", return_tensors="pt")
    for name in ("input_ids", "token_type_ids", "labels", "pixel_values"):
        torch.testing.assert_close(item[name], expected[name][0] if name != "pixel_values" else expected[name])
