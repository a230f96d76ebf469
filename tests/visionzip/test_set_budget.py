"""One projector, every budget: what it says of the budgets it was trained for, and what is refused in one sentence."""

import copy
import json
import logging

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, detach, load, save, set_budget, switch
from visionzip.chat import Chat
from visionzip.export import load_into, read_export
from visionzip.export.insert import loaded_into
from visionzip.inputs import batch_prompts, prompt_inputs
from visionzip.prompts import question, usual_template

ELASTIC = ZipConfig(dominant=5, contextual=3, budgets=[4, 8, "9+3"])
NESTED = ZipConfig(dominant=8, contextual=0, budgets={"least": 2, "most": 12})
QUESTION = "USER: <image> what is this ASSISTANT:"


@pytest.fixture
def base(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trained(base):
    model = tiny_llava()
    model.config._name_or_path = str(base)
    attach(model, tiny_processor(), ELASTIC)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(0.1)
    return model


def logits(model, processor):
    with torch.no_grad():
        return model(**processor(text=QUESTION, images=[make_image(0)], return_tensors="pt")).logits


@pytest.mark.parametrize("form", ["safetensors", "peft", "merged", "llava"])
def test_every_format_says_which_budgets_it_was_trained_for(trained, base, form, tmp_path):
    options = {"vision_tower": str(base), "base": str(base)} if form == "llava" else {}
    save(trained, tmp_path / "llava-out", form, **options)
    assert read_export(tmp_path / "llava-out").header.zip == ELASTIC
    if form == "llava":
        return
    again, processor = load(tmp_path / "llava-out", "cpu")
    assert attached(again).config == attached(again).trained == ELASTIC
    set_budget(again, 4)
    expected = attach(
        copy.deepcopy(detach(again)),
        other := tiny_processor(),
        ELASTIC.model_copy(update={"dominant": 3, "contextual": 1}),
    )
    attach(again, processor, ELASTIC)
    set_budget(again, "3+1")
    assert torch.equal(logits(again, processor), logits(expected, other))
    save(trained, tmp_path / "second", "safetensors")
    assert read_export(tmp_path / "second").header.zip.budgets == ELASTIC.budgets


def test_a_projector_goes_into_a_model_at_any_of_its_budgets(trained, base, tmp_path):
    save(trained, tmp_path / "out")
    for config in (ZipConfig(dominant=3, contextual=1), ZipConfig(dominant=8, contextual=2)):
        model, _ = load(tmp_path / "out", "cpu", config=config)
        assert attached(model).config == config.model_copy(update={"budgets": ELASTIC.budgets})
    with pytest.raises(ValueError, match=r"ZipConfig.dominant: 5 there, 14 here"):
        load(tmp_path / "out", "cpu", config=ZipConfig(dominant=14, contextual=3))
    with pytest.raises(ValueError, match=r"ZipConfig.selector: visionzip there, random here"):
        load(tmp_path / "out", "cpu", config=ZipConfig(dominant=3, contextual=1, selector="random"))
    model = attach(AutoModelForImageTextToText.from_pretrained(base), None, dominant=3, contextual=1)
    with loaded_into(model, tmp_path / "out"):
        assert attached(model).trained == ELASTIC
        assert attached(model).config.budgets == ELASTIC.budgets
    assert (attached(model).trained, attached(model).config) == (None, ZipConfig(dominant=3, contextual=1))
    load_into(model, tmp_path / "out")
    set_budget(model, 12)
    assert (attached(model).config.dominant, attached(model).config.contextual) == (9, 3)


def test_outside_of_what_was_trained_there_is_one_warning(trained, tmp_path, caplog):
    save(trained, tmp_path / "out")
    model, processor = load(tmp_path / "out", "cpu")
    switch._warned.clear()
    with caplog.at_level(logging.WARNING):
        for budget in (4, 8, 10, "9+3", "all", 8):
            set_budget(model, budget)
        assert caplog.records == []
        for budget in (2, 13, 2, 13):
            set_budget(model, budget)
        attach(model, processor, ELASTIC)  # the projector in it is still the same
        set_budget(model, 2)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "this projector was not trained for a budget of 2 + 0 (trained for: 3 + 1 to 9 + 3)",
        "this projector was not trained for a budget of 11 + 2 (trained for: 3 + 1 to 9 + 3)",
    ]


def test_what_was_never_trained_warns_of_nothing(caplog):
    model = attach(tiny_llava(), tiny_processor(), dominant=5, contextual=3)
    with caplog.at_level(logging.WARNING):
        set_budget(model, 2)
    assert caplog.records == []


def test_without_contextual_tokens_no_budget_has_any():
    model = attach(tiny_llava(), processor := tiny_processor(), NESTED)
    kept = {}
    for budget in (2, 5, 8, 12):
        set_budget(model, budget)
        assert (attached(model).config.dominant, attached(model).config.contextual) == (budget, 0)
        pixels = processor.image_processor(images=[make_image(0)], return_tensors="pt")["pixel_values"]
        kept[budget] = {tuple(row) for row in attached(model).compress(pixel_values=pixels)[0].tolist()}
    assert kept[2] < kept[5] < kept[8] < kept[12]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (99, "can't be met: the encoder makes 17 tokens"),
        ("99", "can't be met: the encoder makes 17 tokens"),
        ((16, 9), "can't be met: the encoder makes 17 tokens"),
        (0, "0 is not a budget"),
        (-3, "-3 is not a budget"),
        (1.5, "1.5 is not a budget"),
        (True, "True is not a budget"),
        ("few", "'few' is not a budget"),
        ([4, 8], r"\[4, 8\] is not a budget"),
    ],
)
def test_a_budget_that_can_not_be_changes_nothing(budget, message):
    model = attach(tiny_llava(), processor := tiny_processor(), ELASTIC)
    before = logits(model, processor)
    with pytest.raises(ValueError, match=message) as error:
        set_budget(model, budget)
    assert "\n" not in str(error.value)
    assert attached(model).config == ELASTIC
    assert torch.equal(logits(model, processor), before)


def test_budgets_beyond_the_encoder_are_refused_when_attaching():
    model = tiny_llava()
    for budgets in ([4, 99], {"least": 4, "most": 99}):
        with pytest.raises(ValueError, match=r"budgets: a budget of .* can't be met: the encoder makes 17"):
            attach(model, None, dominant=5, contextual=3, budgets=budgets)
    assert attached(model) is None
    with pytest.raises(ValueError, match="nothing is attached to this model"):
        set_budget(model, 4)


def test_a_merged_export_whose_processor_is_fixed(trained, tmp_path):
    save(trained, tmp_path / "out", "merged")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match="have a fixed budget") as error:
        set_budget(model, 4)
    assert "\n" not in str(error.value)
    attach(model, processor, ELASTIC)
    set_budget(model, 4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["visionzip"]["budgets"]["totals"] == [4, 8, "9+3"]


def test_without_a_processor_stock_prompts_are_cut_to_the_new_budget():
    model = attach(tiny_llava(), None, dominant=5, contextual=3)
    stock = tiny_processor()
    for budget, length in ((4, 4), ("all", 16), (12, 12)):
        set_budget(model, budget)
        assert logits(model, stock).shape[1] == length + 6


def test_images_with_budgets_are_refused_where_they_can_not_be():
    processor = tiny_processor()
    template = usual_template(processor)
    asked = {"messages": [question("what is this", 1)], "images": [make_image(0)]}
    with pytest.raises(ValueError, match="need a processor that is attached"):
        prompt_inputs(template, **asked, budgets=[4])
    model = attach(tiny_llava(), processor, ELASTIC)
    for budgets, message in (
        ([99], "can't be met"),
        (["all"], "can't have all visual tokens"),
        ([4, 4], "2 budgets were given for 1 image;"),
        (["x"], "'x' is not a budget"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt_inputs(template, **asked, budgets=budgets)
    row = prompt_inputs(template, **asked, budgets=[4])
    with pytest.raises(ValueError, match="2 budgets were given for 1 image;"):
        attached(model).compress([4, 4], pixel_values=row["pixel_values"])
    plain = batch_prompts(processor, [prompt_inputs(template, **asked)])
    assert attached(model).encode(plain) is plain


def test_a_chat_in_which_one_image_has_a_budget_of_its_own():
    model = attach(tiny_llava(), processor := tiny_processor(), ELASTIC)
    chat = Chat(model, processor, max_new_tokens=4)
    chat.show(make_image(0))
    chat.show(make_image(1), "9+3")
    turn = chat.ask("what is this")
    assert [now for now, _ in turn.images] == [8, 12]
    assert chat.ask("what").encoded == 0
    row = prompt_inputs(usual_template(processor), chat.messages[:-1], chat.images, budgets=[None, 12])
    batch = attached(model).encode(batch_prompts(processor, [row]))
    output = model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False, suppress_tokens=[4])
    said = processor.tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chat.messages[-1].text == said.strip()
    chat.budget(4)
    chat.ask("how many")
    assert [chat._count(one)[0] for one in chat.images] == [4, 12]
    with pytest.raises(ValueError, match="can't be met"):
        chat.show(make_image(2), 99)
    assert chat.waiting == []
