"""Budgets of each picture's own: how many tokens, that a prompt fits them, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families.case_llava_next import CASE as NEXT
from tests.families.case_qwen2_vl import CASE as QWEN
from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, detach, load, save
from visionzip.adaptive import calibrate, held, needed
from visionzip.analysis.calibrate import calibrated
from visionzip.analysis.trace import trace
from visionzip.chat import Chat
from visionzip.compress import compress
from visionzip.config import Adaptive
from visionzip.families.tiles import pack_each, pack_image
from visionzip.inputs import batch_prompts, prompt_inputs
from visionzip.prompts import usual_template
from visionzip.selectors import Features

IMAGE = 4
MOST = ZipConfig(dominant=9, contextual=3, adaptive={"threshold": 0.6, "least": 2})


def features(batch: int, patches: int, seed: int, has_cls: bool = True) -> Features:
    draw = torch.Generator().manual_seed(seed)
    total = patches + has_cls
    scores = torch.rand(batch, total, generator=draw) ** 6  # from nearly even to nearly all in one
    return Features(
        torch.randn(batch, total, 6, generator=draw), torch.randn(batch, total, 4, generator=draw), scores, has_cls
    )


def slow_count(one: Features, adaptive: Adaptive, most: int) -> int:
    """Dominant tokens of one picture, CLS included, patch by patch."""
    cls = one.cls
    taken: list[int] = []
    tokens = F.normalize(one.hidden_states[0, cls:], dim=-1)
    scores = one.scores[0, cls:].double().tolist()
    near = [[max(0.0, float(a @ b)) for b in tokens] for a in tokens]

    def reached() -> float:
        if adaptive.measure == "attention":
            return sum(scores[patch] for patch in taken) / sum(scores)
        return sum(max((row[patch] for patch in taken), default=0.0) for row in near) / len(near)

    def gain(patch: int) -> float:
        if adaptive.measure == "attention":
            return scores[patch]
        best = [max((row[other] for other in taken), default=0.0) for row in near]
        return sum(max(0.0, row[patch] - before) for row, before in zip(near, best, strict=True))

    while len(taken) + cls < most and (
        reached() < adaptive.threshold or len(taken) + cls < adaptive.least or not taken
    ):
        taken.append(max((patch for patch in range(len(scores)) if patch not in taken), key=gain))
    return len(taken) + cls


@pytest.mark.parametrize("measure", ["attention", "coverage"])
@settings(max_examples=40, deadline=None)
@given(
    patches=st.integers(2, 12), seed=st.integers(0, 10**6), threshold=st.floats(0.02, 0.98), least=st.integers(1, 6),
    has_cls=st.booleans(), data=st.data(),
)  # fmt: skip
def test_a_picture_keeps_the_fewest_that_hold_the_threshold(measure, patches, seed, threshold, least, has_cls, data):
    found = features(3, patches, seed, has_cls)
    most = data.draw(st.integers(max(least, has_cls + 1), max(patches + has_cls, least)))
    if most > patches + has_cls:
        return
    adaptive = Adaptive(threshold=threshold, measure=measure, least=least)
    shares = held(found, measure, most - has_cls)
    counts = needed(shares, adaptive, int(has_cls)).tolist()
    for row, count in enumerate(counts):
        one = Features(*(t[row : row + 1] for t in (found.hidden_states, found.metric, found.scores)), has_cls)
        near_tie = bool((shares[row] - threshold).abs().min() < 1e-3)  # where rounding decides, either will do
        assert count == slow_count(one, adaptive, most) or near_tie
        assert max(least, 1 + has_cls) <= count <= most
        assert needed(held(one, measure, most - has_cls), adaptive, int(has_cls)).tolist() == [count] or near_tie
    assert (shares.diff(dim=1) >= -1e-9).all()
    assert (shares <= 1 + 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), mean=st.floats(7.0, 12.0), least=st.integers(1, 4))
def test_the_calibrated_threshold_is_the_largest_that_keeps_the_mean(seed, mean, least):
    shares = held(features(20, 16, seed), "attention", 9)
    adaptive = Adaptive(threshold=0.5, least=least)
    threshold, average = calibrate(shares, mean, adaptive, 1, 3)

    def by_hand(at: float) -> float:
        each = [max(least, 1 + min(9, sum(share < at for share in row) + 1)) for row in shares.tolist()]
        return sum(each) / len(each) + 3

    assert average == pytest.approx(by_hand(threshold))
    assert average <= mean
    above = min((share for row in shares.tolist() for share in row if share > threshold), default=None)
    if above is not None and above + 1e-5 < 1:
        assert by_hand(above + 2e-6) > mean, "the next step up would be too much"


@pytest.mark.parametrize("mean", [2.0, 13.0, 40.0])
def test_a_mean_that_cant_be_had_is_refused(mean):
    with pytest.raises(ValueError, match=r"a mean of .* tokens is not possible"):
        calibrate(held(features(4, 16, 0), "attention", 9), mean, Adaptive(threshold=0.5), 1, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adaptive": {"threshold": 1.0}}, "less than 1"),
        ({"adaptive": {"threshold": 0.0}}, "greater than 0"),
        ({"adaptive": {"threshold": 0.5, "least": 60}}, "adaptive.least=60 is more than dominant=54"),
        ({"adaptive": {"threshold": 0.5, "measure": "size"}}, "'attention' or 'coverage'"),
        ({"adaptive": {"thresholds": 0.5}}, "thresholds"),
    ],
)
def test_settings_that_cant_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ZipConfig(**fields)


@pytest.fixture
def model():
    model = tiny_llava()
    with torch.no_grad():  # pictures differ in how far their attention is spread
        model.model.vision_tower.encoder.layers[1].self_attn.q_proj.weight.mul_(12.0)
    return model


@pytest.fixture
def processor():
    return tiny_processor()


def fixed(model, count: int, config: ZipConfig = MOST, processor=None):
    """A copy of the untouched `model` with a budget of `count` dominant tokens for every picture."""
    plain = ZipConfig(**{**config.model_dump(exclude={"adaptive"}), "dominant": count})
    return attach(copy.deepcopy(model), processor, plain)


def counts_of(model, pixels) -> list[int]:
    return [len(each) - MOST.contextual for each in attached(model).compress(pixel_values=pixels)]


@pytest.mark.parametrize("selector", ["visionzip", "coverage", "vispruner"])
@pytest.mark.parametrize(("measure", "threshold"), [("attention", 0.6), ("coverage", 0.6)])
def test_each_picture_is_what_it_is_alone_with_a_fixed_budget(model, processor, selector, measure, threshold):
    adaptive = Adaptive(threshold=threshold, measure=measure)
    config = MOST.model_copy(update={"selector": selector, "adaptive": adaptive})
    pixels = processor.image_processor(images=[make_image(n) for n in range(12)], return_tensors="pt")["pixel_values"]
    plain = copy.deepcopy(model)
    found = attached(attach(model, None, config)).compress(pixel_values=pixels)
    counts = [len(each) - config.contextual for each in found]
    assert len(set(counts)) > 2, "pictures differ in what they need"
    assert all(2 <= count <= 9 for count in counts)
    for number, each in enumerate(found):
        (alone,) = attached(fixed(plain, counts[number], config)).compress(pixel_values=pixels[number : number + 1])
        torch.testing.assert_close(each, alone)
    assert attached(model).token_counts(pixel_values=pixels) == [(16, len(each)) for each in found]


def prompt(processor, texts, pictures, **options):
    return processor(text=texts, images=pictures or None, return_tensors="pt", **options)


QUESTION = "USER: <image> what is this ASSISTANT:"


def answer(model, inputs, **options):
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"]), "the prompt as it was given"
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "no cache", "beams"])
@pytest.mark.parametrize("with_processor", [True, False], ids=["processor", "stock prompt"])
def test_answers_are_those_of_each_pictures_fixed_budget(model, processor, with_processor, options):
    plain = copy.deepcopy(model)
    attach(model, processor if with_processor else None, MOST)
    for number in range(4):
        inputs = prompt(processor, QUESTION, [make_image(number, (32, 32))])
        assert (inputs["input_ids"] == IMAGE).sum() == (12 if with_processor else 16)
        (count,) = counts_of(model, inputs["pixel_values"])
        own = tiny_processor()
        other = fixed(plain, count, processor=own)
        expected = answer(other, prompt(own, QUESTION, [make_image(number, (32, 32))]), **options)
        assert torch.equal(answer(model, inputs, **options), expected)


def test_the_encoder_runs_once(model, processor):
    attach(model, processor, MOST)
    calls = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    answer(model, prompt(processor, QUESTION, [make_image(0)]))
    assert len(calls) == 1


def test_a_mixed_batch_answers_as_its_rows_do_alone(model, processor):
    """Two pictures, one, none: rows of different lengths, padded on the left."""
    attach(model, processor, MOST)
    processor.tokenizer.padding_side = "left"
    texts = ["USER: <image> what is this <image> ASSISTANT:", "USER: what is red ASSISTANT:", QUESTION]
    pictures = [make_image(3), make_image(1), make_image(7)]
    together = answer(model, prompt(processor, texts, pictures, padding=True))
    alone = [answer(model, prompt(processor, text, own)) for text, own in zip(texts, (pictures[:2], [], pictures[2:]), strict=True)]  # fmt: skip
    assert torch.equal(together, torch.cat(alone))


def test_a_second_turn_reads_on(model, processor):
    attach(model, processor, MOST)
    first = prompt(processor, QUESTION, [make_image(0)])
    said = processor.tokenizer.decode(answer(model, first)[0])
    both = f"{QUESTION} {said} USER: <image> how many ASSISTANT:"
    second = prompt(processor, both, [make_image(0), make_image(5)])
    counts = counts_of(model, second["pixel_values"])
    inputs, pictures = attached(model).fit(dict(second))
    assert [len(each) - 3 for each in pictures] == counts
    assert (inputs["input_ids"] == IMAGE).sum() == sum(counts) + 6
    by_hand = model.generate(
        **inputs, mm_encoder_outputs=attached(model).encoder_outputs(pictures), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(answer(model, second), by_hand[:, inputs["input_ids"].shape[1] :])


def test_loss_and_gradient_are_those_of_short_prompts(model, processor):
    """Labels are cut with the text; each row counts as with its picture's own fixed budget."""
    plain = copy.deepcopy(model)
    attach(model, processor, MOST)
    processor.tokenizer.padding_side = "right"
    texts = [f"{QUESTION} a red circle", f"{QUESTION} yes"]
    inputs = prompt(processor, texts, [make_image(0), make_image(5)], padding=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100).masked_fill(inputs["input_ids"] == IMAGE, -100)  # fmt: skip
    counts = counts_of(model, inputs["pixel_values"])
    assert counts[0] != counts[1]
    supervised = [int((row[1:] != -100).sum()) for row in labels]
    model(**inputs, labels=labels).loss.backward()
    weight = model.model.multi_modal_projector.linear_1.weight
    losses, gradient = [], torch.zeros_like(weight)
    for number, count in enumerate(counts):
        own = tiny_processor()
        other = fixed(plain, count, processor=own)
        row = prompt(own, texts[number], [make_image((0, 5)[number])])
        loss = other(**row, labels=row["input_ids"].masked_fill(row["input_ids"] == IMAGE, -100)).loss
        (loss * supervised[number] / sum(supervised)).backward()
        losses.append(loss.item() * supervised[number] / sum(supervised))
        gradient += other.model.multi_modal_projector.linear_1.weight.grad
    with torch.no_grad():
        assert model(**inputs, labels=labels).loss.item() == pytest.approx(sum(losses), rel=1e-5)
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_prompt_that_is_not_for_these_pictures_is_refused(model, processor):
    attach(model, processor, MOST)
    inputs = prompt(processor, QUESTION, [make_image(0)])
    inputs["input_ids"] = inputs["input_ids"][:, :-6]
    stock = prompt(tiny_processor(), QUESTION, [make_image(0)])
    with pytest.raises(ValueError, match=r"contains 16 image placeholders, but needs 12 for its images"):
        model(**stock)
    with pytest.raises(ValueError, match="position_ids"):
        model(**prompt(processor, QUESTION, [make_image(0)]), position_ids=torch.arange(99)[None])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_attached_to_themselves(model, processor, clone):
    attach(model, processor, MOST)
    inputs = prompt(processor, QUESTION, [make_image(0)])
    expected = answer(model, inputs)
    other = clone(model)
    assert torch.equal(answer(other, inputs), expected)
    with torch.no_grad():
        other.model.multi_modal_projector.linear_1.weight.normal_(generator=torch.Generator().manual_seed(1))
        assert not torch.equal(other(**inputs).logits, model(**inputs).logits)
    assert attached(other).model is other
    assert attached(other).shortener.model is other


def test_detach_leaves_nothing(model, processor):
    stock, stock_processor = copy.deepcopy(model), tiny_processor()
    before = set(model.__dict__)
    detach(attach(model, processor, MOST))
    assert set(model.__dict__) == before
    inputs = prompt(processor, QUESTION, [make_image(0)])
    assert torch.equal(inputs["input_ids"], prompt(stock_processor, QUESTION, [make_image(0)])["input_ids"])
    assert torch.equal(answer(model, inputs), answer(stock, inputs))
    assert not model._forward_pre_hooks


def test_tiles_stop_on_their_own(tmp_path):
    """LLaVA-NeXT: every tile has a number of its own; equal numbers give what a fixed budget gives."""
    many = ZipConfig(dominant=27, contextual=5, adaptive={"threshold": 0.05})
    model, processor = NEXT.model(), NEXT.processor()
    attach(model, processor, many)
    inputs = processor(
        text="USER: <image> what is this ASSISTANT:", images=[make_image(0, (300, 700))], return_tensors="pt"
    )
    ((_, now),) = attached(model).token_counts(pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    written = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert now < written
    assert written % 32 == 0
    assert len(answer(model, inputs)[0]) == 5
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1] - written + now


def test_tiles_of_equal_numbers_are_packed_as_ever():
    found = features(5, 16, 0)
    together = compress(found, 6, 2)
    each = [compress(Features(*(t[n : n + 1] for t in (found.hidden_states, found.metric, found.scores)), True), 6, 2) for n in range(5)]  # fmt: skip
    assert torch.equal(pack_each(each, (2, 2), 4, True), pack_image(together, (2, 2), 4, True))


def test_unequal_tiles_are_packed_patch_by_patch():
    found = features(5, 16, 1)
    keep = [9, 3, 7, 2, 5]
    each = [compress(Features(*(t[n : n + 1] for t in (found.hidden_states, found.metric, found.scores)), True), count, 2) for n, count in enumerate(keep)]  # fmt: skip
    stitched = []
    for number, tile in enumerate(each[1:]):
        for place, token in zip(tile.kept[0, 1:].tolist(), tile.tokens[0, 1 : keep[number + 1]], strict=True):
            patch = place - 1
            stitched.append(((number // 2 * 4 + patch // 4, number % 2 * 4 + patch % 4), token))
    expected = [*each[0].tokens[0], *(token for _, token in sorted(stitched, key=lambda pair: pair[0]))]
    expected += [tile.tokens[0, 0] for tile in each[1:]] + [token for tile in each[1:] for token in tile.tokens[0, -2:]]
    assert torch.equal(pack_each(each, (2, 2), 4, True), torch.stack(expected))
    with pytest.raises(ValueError, match="has 4, but 3 were given"):
        pack_each(each[:-1], (2, 2), 4, True)


def test_other_families_say_so():
    with pytest.raises(ValueError, match="does not support per-image budgets"):
        attach(QWEN.model(), QWEN.processor(), ZipConfig(dominant=9, contextual=3, adaptive={"threshold": 0.5}))


@pytest.mark.parametrize("measure", ["attention", "coverage"])
def test_calibration_over_pictures_gives_the_mean_it_says(model, processor, measure):
    attachment = attached(attach(model, processor, dominant=9, contextual=3))
    pictures = [make_image(number, (32, 32)) for number in range(20)]
    found = calibrated(attachment, processor, pictures, 9.5, Adaptive(threshold=0.5, measure=measure, least=2))
    assert found.config.dominant == 9
    attach(model, processor, found.config)
    pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    kept = [len(each) for each in attached(model).compress(pixel_values=pixels)]
    assert kept == found.counts.tolist()
    assert found.mean == pytest.approx(sum(kept) / len(kept))
    assert 8.5 < found.mean <= 9.5


def test_calibration_of_a_family_without_such_budgets_is_refused():
    attachment = attached(attach(QWEN.model(), QWEN.processor(), QWEN.budget))
    with pytest.raises(ValueError, match="does not support per-image budgets"):
        calibrated(attachment, QWEN.processor(), [make_image(0)], 9, Adaptive(threshold=0.5))


def test_a_chat_keeps_its_cache_and_encodes_each_picture_once(model, processor):
    chat = Chat(attach(model, processor, MOST), processor, max_new_tokens=5)
    encoded: list[int] = []
    model.model.vision_tower.embeddings.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    for question, pictures in (("what is this", [0]), ("is this red", []), ("how many", [5, 7])):
        for number in pictures:
            chat.show(make_image(number, (32, 32)))
        encoded.clear()
        turn = chat.ask(question)
        assert encoded == [1] * len(pictures)
        row = prompt_inputs(usual_template(processor), chat.messages[:-1], chat.images)
        whole = batch_prompts(processor, [row])
        assert turn.text == processor.tokenizer.decode(
            answer(model, whole, suppress_tokens=[IMAGE])[0], skip_special_tokens=True
        )
        assert [now for now, _ in turn.images] == [
            len(attached(model).compress(**chat._pixels([each]))[0])
            for each in chat.images[len(chat.images) - len(pictures) :]
        ]
    assert turn.prompt - turn.prefilled > 20, "the conversation so far was not computed again"
    chat.budget(ZipConfig(dominant=5, contextual=3))
    assert chat.ask("what is this").prefilled > 24, "under another budget all three pictures are read anew"


@pytest.mark.parametrize("form", ["safetensors", "merged"])
def test_an_export_brings_its_budgets_along(model, processor, form, tmp_path):
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    trained, own = load(tmp_path / "base", "cpu", config=MOST)
    with torch.no_grad():
        trained.model.multi_modal_projector.linear_2.weight.add_(0.1)
    save(trained, tmp_path / "out", form)
    again, other = load(tmp_path / "out", "cpu")
    assert attached(again).config == MOST
    inputs = prompt(own, QUESTION, [make_image(0)])
    assert torch.equal(inputs["input_ids"], prompt(other, QUESTION, [make_image(0)])["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, trained(**inputs).logits)
    if form == "safetensors":
        with pytest.raises(ValueError, match="adaptive"):
            load(tmp_path / "out", "cpu", config=MOST.model_copy(update={"adaptive": None}))


def test_what_is_drawn_is_what_each_picture_keeps(model, processor):
    attach(model, processor, MOST)
    for number in range(4):
        shown = trace(model, make_image(number, (32, 32)))
        (tile,) = shown.tiles
        assert len(tile.kept) + len(tile.targets) == shown.tokens
        assert shown.held >= 0.6 or len(tile.kept) == 9
