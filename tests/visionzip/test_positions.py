"""`ZipConfig.positions: original` against position ids made by hand and the plain model, wherever a prompt goes through it."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.nn.functional import pad

from data.cache.reader import VISUAL, pack, unpack
from tests.families.case import cases
from tests.tiny import make_image, tiny_llava, tiny_processor
from train.cached import place_tokens, read_from_cache
from train.layout import PackedRow, PaddedRows
from train.loss import summed_loss
from train.prefix import Prefix
from visionzip import ZipConfig, attach, attached, detach, load, save
from visionzip.chat import Chat
from visionzip.commands import _model
from visionzip.export import save_projector
from visionzip.selectors import SELECTORS

IMAGE, STOCK, BUDGET = 4, 16, ZipConfig(dominant=5, contextual=2, positions="original")
FIRST, SECOND = "USER: <image> what is this ASSISTANT: ", "a red circle USER: <image> how many ASSISTANT: "


@pytest.fixture
def ready():
    model, processor = tiny_llava(), tiny_processor()
    return attach(model, processor, BUDGET), processor


def inputs_of(processor, text, *seeds):
    return processor(text=text, images=[make_image(seed, (32, 32)) for seed in seeds] or None, return_tensors="pt")


def places_by_hand(model, pixels):
    """For each token, in the order CLS, patches, contextual: where the untouched model has it. CLS stands with the first patch."""
    features = attached(model).family.encode(BUDGET, pixels)
    kept = [0, *(int(p) + 1 for p in SELECTORS["visionzip"].select(features, 4)[0])]
    rest = [token for token in range(17) if token not in kept]
    return [max(token - 1, 0) for token in [*kept, rest[0], rest[6]]]


def by_hand(model, inputs):
    """Position ids of one row and the plain model's logits at them."""
    pixels, positions, where = list(inputs.get("pixel_values", [])), [], 0
    ids = inputs["input_ids"][0].tolist()
    while len(positions) < len(ids):
        if ids[len(positions)] == IMAGE:
            positions += [where + place for place in places_by_hand(model, pixels.pop(0)[None])]
            where += STOCK
        else:
            positions, where = [*positions, where], where + 1
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    if "pixel_values" in inputs:
        embeds[inputs["input_ids"] == IMAGE] = torch.cat(
            attached(model).project(attached(model).compress(pixel_values=inputs["pixel_values"]))
        )
    position_ids = torch.tensor([positions])
    mask = torch.ones_like(inputs["input_ids"])
    stock = tiny_llava()
    return position_ids, stock.model.language_model(
        inputs_embeds=embeds, position_ids=position_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state @ stock.lm_head.weight.t()


@torch.no_grad()
def test_forward_equals_the_plain_model_at_positions_by_hand(ready):
    model, processor = ready
    inputs = inputs_of(processor, FIRST + SECOND, 0, 1)
    positions, expected = by_hand(model, inputs)
    assert positions[0, -1] == positions.shape[1] - 1 + 2 * (STOCK - 7)
    for given in (inputs, {name: inputs[name] for name in ("input_ids", "pixel_values")}):
        torch.testing.assert_close(model(**given).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(**given, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    compact = attach(tiny_llava(), tiny_processor(), BUDGET.model_copy(update={"positions": "compact"}))
    assert (compact(**inputs).logits - expected).abs().max() > 0.01


def greedy(model, inputs, count):
    """One token after another, each time the whole prompt by hand."""
    ids = inputs["input_ids"]
    for _ in range(count):
        _, logits = by_hand(model, {**inputs, "input_ids": ids})
        logits[..., IMAGE] = -torch.inf  # never an answer: see suppress_tokens
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids


@torch.no_grad()
def test_generate_with_and_without_cache_in_batches_beams_and_later_turns(ready):
    model, processor = ready
    first = inputs_of(processor, FIRST, 0)
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
    expected = greedy(model, first, 3)
    output = model.generate(**first, **options, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert torch.equal(model.generate(**first, **options, use_cache=False), expected)
    beams = model.generate(**first, **options, num_beams=2)
    assert torch.equal(beams, model.generate(**first, **options, num_beams=2, use_cache=False))
    processor.tokenizer.padding_side = "left"
    texts = [FIRST, "USER: " + FIRST, "USER: what is this ASSISTANT:"]
    both = processor(text=texts, images=[make_image(0, (32, 32))] * 2, return_tensors="pt", padding=True)
    rows = model.generate(**both, **options)
    assert torch.equal(rows[0, -3:], expected[0, -3:])
    assert torch.equal(rows[1, -3:], model.generate(**inputs_of(processor, "USER: " + FIRST, 0), **options)[0, -3:])
    # a later turn with a new image on the cache, and a question without one after it
    ids = torch.cat((output.sequences, inputs_of(processor, SECOND, 1)["input_ids"][:, 1:]), dim=1)
    whole = {
        "input_ids": ids,
        "pixel_values": torch.cat([inputs_of(processor, FIRST, seed)["pixel_values"] for seed in (0, 1)]),
    }
    cached = model.generate(input_ids=ids, pixel_values=whole["pixel_values"][1:], attention_mask=torch.ones_like(ids),
                            past_key_values=output.past_key_values, **options, return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(cached.sequences, greedy(model, whole, 3))
    more = torch.cat((cached.sequences, torch.tensor([[5, 7, 8, 6]])), dim=1)
    last = model.generate(
        input_ids=more, attention_mask=torch.ones_like(more), past_key_values=cached.past_key_values, **options
    )
    assert torch.equal(last, greedy(model, {**whole, "input_ids": more}, 3))


@torch.no_grad()
def test_forward_on_a_cache_that_was_cropped(ready):
    model, processor = ready
    inputs = inputs_of(processor, FIRST, 0)
    ids = inputs["input_ids"]
    cache = model(input_ids=ids[:, :-3], pixel_values=inputs["pixel_values"]).past_key_values
    model(input_ids=torch.tensor([[9, 9]]), past_key_values=cache)
    cache.crop(-2)
    logits = model(input_ids=ids[:, -3:], past_key_values=cache).logits
    torch.testing.assert_close(logits, by_hand(model, inputs)[1][:, -3:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_chat_answers_as_the_whole_conversation_would(ready):
    model, processor = ready
    chat = Chat(model, processor, max_new_tokens=2)
    chat.show(make_image(0, (32, 32)))
    chat.ask("what is this")
    chat.show(make_image(1, (32, 32)))
    turn = chat.ask("how many")
    assert turn.encoded == 1
    assert turn.prefilled < turn.prompt
    ids = chat._held[None, : turn.prompt]
    pixels = torch.cat([chat._pixels([each])["pixel_values"] for each in chat.images])
    expected = greedy(model, {"input_ids": ids, "pixel_values": pixels}, 2)
    assert torch.equal(chat._held, expected[0, : len(chat._held)])


@pytest.mark.parametrize("layout", ["padded", "padded prefix", "packed", "packed prefix"])
@pytest.mark.parametrize("cached", [True, False])
def test_training_layouts(ready, layout, cached):
    model, processor = ready
    model.requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
    system = "USER: " * 10
    texts = [system + FIRST + "a red circle", system + FIRST + SECOND + "two"]
    rows = [inputs_of(processor, texts[0], 0), inputs_of(processor, texts[1], 1, 2)]
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch = {
        name: torch.cat([pad(row[name], (0, longest - row[name].shape[1]), value=filler) for row in rows])
        for name, filler in (("input_ids", 3), ("attention_mask", 0))
    }
    batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    labels[0, 23:26] = batch["input_ids"][0, 23:26]  # the last of 26 tokens
    expected, pixels = 0.0, list(batch["pixel_values"].split([1, 2]))
    for row, images in enumerate(pixels):
        real = batch["attention_mask"][row].bool()
        alone = {"input_ids": batch["input_ids"][row, real][None], "pixel_values": images}
        logits = by_hand(model, alone)[1]
        expected += torch.nn.functional.cross_entropy(logits[0, :-1], labels[row, real][1:], reduction="sum")
    gradients = torch.autograd.grad(expected, list(model.model.multi_modal_projector.parameters()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    if cached:  # through what a cache stores
        shapes, tensors = pack(attached(model).compress(pixel_values=inputs.pop("pixel_values")), torch.float32)
        inputs[VISUAL] = unpack(shapes, tensors)
    read_from_cache(model)
    prefix = Prefix(model, "model.language_model", batch["input_ids"][0, :10]) if "prefix" in layout else None
    assert prefix is None or prefix.possible
    made = PackedRow(model.model.language_model, prefix) if "packed" in layout else PaddedRows(prefix, masked=False)
    inputs = place_tokens(model, inputs)
    loss = summed_loss(model, model.lm_head, inputs, labels, made)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(loss, list(model.model.multi_modal_projector.parameters()))
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_detached_exported_and_refused(ready, tmp_path):
    model, processor = ready
    save_projector(model, tmp_path / "export", {})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    inputs = inputs_of(processor, FIRST, 0)
    expected = by_hand(model, inputs)[1]
    again, _ = load(tmp_path / "export", base=tmp_path / "model")
    assert attached(again).config.positions == "original"
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="LLaVA's own code numbers visual tokens consecutively"):
        save(model, tmp_path / "llava-export", "llava", base=tmp_path / "model")
    detach(model)
    assert "_prepare_position_ids_for_generation" not in model.__dict__
    assert not model.model._forward_pre_hooks
    case = next(case for case in cases() if case.name == "LLaVA-NeXT")
    with pytest.raises(ValueError, match="LlavaNextForConditionalGeneration does not support positions=original"):
        attach(case.model(), case.processor(), BUDGET)


def test_commands_take_them(ready, tmp_path):
    model, processor = ready
    tiny_llava().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    parser = argparse.ArgumentParser()
    _model.add_arguments(parser)
    inputs = inputs_of(processor, FIRST, 0)
    given = [str(tmp_path / "model"), "--device", "cpu", "--dominant", "5", "--contextual", "2"]
    loaded, _ = _model.load(parser.parse_args([*given, "--positions", "original"]))
    torch.testing.assert_close(loaded(**inputs).logits, by_hand(model, inputs)[1], rtol=1e-4, atol=1e-4)
    assert attached(_model.load(parser.parse_args(given))[0]).config.positions == "compact"


def test_what_is_stored_of_the_default_stays_as_it_was():
    assert "positions" not in ZipConfig().model_dump()
    assert ZipConfig(**BUDGET.model_dump()) == BUDGET
