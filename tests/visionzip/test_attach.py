"""attach/detach on LLaVA: prompts, generate, caches, several images; and nothing left behind."""

import copy
import gc
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, detach, visionzip

IMAGE = 4
BUDGET = ZipConfig(dominant=5, contextual=3)


def square(seed):
    """What a stock processor and one that pads images give the same pixels of."""
    return make_image(seed, (40, 40))


def prompt(processor, text="USER: <image> what is this ASSISTANT:", images=1):
    return processor(text=text, images=[square(i) for i in range(images)], return_tensors="pt")


def new_tokens(model, inputs, count=6, **kwargs):
    kwargs = {"suppress_tokens": [IMAGE], **kwargs}  # random weights would say <image>
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :]


def by_hand(model, inputs):
    """Embeddings spliced by a loop, through the untouched language model: what attach should amount to."""
    attachment = attached(model)
    with torch.no_grad():
        tokens = attachment.project(attachment.compress(pixel_values=inputs["pixel_values"]))
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).clone()
        visual = iter(torch.cat(tokens))
        for row in range(len(embeddings)):
            for place in range(embeddings.shape[1]):
                if inputs["input_ids"][row, place] == IMAGE:
                    embeddings[row, place] = next(visual)
        hidden = model.model.language_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])[0]
        return model.lm_head(hidden)


def test_prompts_get_the_budget_and_logits_are_those_of_the_spliced_tokens(model, processor):
    stock = prompt(processor)
    attach(model, processor, BUDGET)
    inputs = prompt(processor)
    assert (stock["input_ids"] == IMAGE).sum() == 16
    assert (inputs["input_ids"] == IMAGE).sum() == 8
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, by_hand(model, inputs))
    assert attached(model).token_counts(pixel_values=inputs["pixel_values"]) == [(16, 8)]


def test_generate_with_and_without_cache_agree_and_encode_once(model, processor):
    attach(model, processor, BUDGET)
    inputs = prompt(processor)
    calls = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    cached = new_tokens(model, inputs)
    assert len(calls) == 1
    assert torch.equal(cached, new_tokens(model, inputs, use_cache=False))
    assert len(set(cached[0].tolist())) > 1  # says something


def test_batch_of_different_lengths_and_numbers_of_images(model, processor):
    attach(model, processor, BUDGET)
    texts = [
        "USER: <image> what is this ASSISTANT:",
        "USER: <image> <image> how many red circle ASSISTANT:",
        "USER: what is red ASSISTANT:",
    ]
    images = [make_image(i) for i in range(3)]
    processor.tokenizer.padding_side = "left"
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
    together = new_tokens(model, batch)
    alone = [
        new_tokens(model, processor(text=text, images=some or None, return_tensors="pt"))
        for text, some in zip(texts, (images[:1], images[1:], []), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_static_cache(model, processor, kwargs):
    attach(model, processor, BUDGET)
    inputs = prompt(processor)
    output = new_tokens(model, inputs, **kwargs)
    assert torch.equal(output, new_tokens(model, inputs, use_cache=False, num_beams=kwargs.get("num_beams", 1)))


def test_three_turns_on_one_cache(model, processor):
    """Second turn: text only. Third turn: a new image. Each equals recomputing the whole conversation."""
    attach(model, processor, BUDGET)
    model.generation_config.suppress_tokens = [IMAGE]  # random weights would say <image>
    text = "USER: <image> what is this ASSISTANT:"
    shown, cache = [make_image(0)], None
    for turn, new in enumerate([[make_image(0)], [], [make_image(7)]]):
        if turn:
            text += " </s> USER: " + "<image> " * len(new) + "how many ASSISTANT:"
            shown = shown + new
        whole = processor(text=text, images=shown, return_tensors="pt")
        inputs = dict(whole)
        if new:
            inputs["pixel_values"] = whole["pixel_values"][-len(new) :]
        else:
            inputs.pop("pixel_values")
        if cache is not None:
            inputs["past_key_values"] = cache
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        cache = output.past_key_values
        answer = output.sequences[:, whole["input_ids"].shape[1] :]
        assert torch.equal(answer, new_tokens(model, whole, 4)), f"turn {turn}"
        text += " " + processor.tokenizer.decode(answer[0])


def test_keeping_every_token_equals_the_untouched_model_with_cls():
    untouched, stock = tiny_llava(strategy="full"), tiny_processor(strategy="full")
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, ZipConfig(dominant=17, contextual=0))
    expected, inputs = prompt(stock), prompt(processor)
    assert torch.equal(expected["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, untouched(**expected).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(new_tokens(model, inputs, 8), new_tokens(untouched, expected, 8))


def test_detach_leaves_nothing(model, processor):
    untouched, stock = tiny_llava(), tiny_processor()
    before = (dict(model.__dict__), dict(model.model.__dict__), dict(processor.__dict__), model.config.to_dict())
    attach(model, processor, BUDGET)
    new_tokens(model, prompt(processor), 2)
    assert detach(model) is model
    assert attached(model) is None
    for owner, then in zip((model, model.model, processor), before, strict=False):
        assert owner.__dict__.keys() == then.keys()
    assert model.config.to_dict() == before[3]
    expected, inputs = prompt(stock), prompt(processor)
    assert torch.equal(expected["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, untouched(**expected).logits)
    assert torch.equal(new_tokens(model, inputs), new_tokens(untouched, expected))


def test_other_models_and_processors_in_the_process_are_not_affected(model, processor):
    other, other_processor = tiny_llava(), tiny_processor()
    expected = other(**prompt(other_processor)).logits
    third, third_processor = tiny_llava(), tiny_processor()
    attach(model, processor, BUDGET)
    attach(third, third_processor, ZipConfig(dominant=9, contextual=0))
    assert torch.equal(other(**prompt(other_processor)).logits, expected)
    assert (prompt(processor)["input_ids"] == IMAGE).sum() == 8
    assert (prompt(third_processor)["input_ids"] == IMAGE).sum() == 9
    assert "get_image_features" not in LlavaForConditionalGeneration.__dict__ or not hasattr(
        LlavaForConditionalGeneration.get_image_features, "family"
    )


def test_attach_again_replaces(model, processor):
    attach(model, processor, BUDGET)
    attach(model, processor, dominant=9, contextual=1)
    assert (prompt(processor)["input_ids"] == IMAGE).sum() == 10
    model(**prompt(processor))
    detach(model)
    assert (prompt(processor)["input_ids"] == IMAGE).sum() == 16


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("with_processor", [True, False])
def test_copies_are_attached_to_themselves(model, processor, clone, with_processor):
    inputs = prompt(processor)
    attach(model, processor if with_processor else None, BUDGET)
    inputs = prompt(processor) if with_processor else inputs
    expected = new_tokens(model, inputs)
    twin = clone(model)
    detach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(new_tokens(twin, inputs), expected)
    assert attached(twin).model is twin
    assert attached(twin).family.model is twin
    detach(twin)
    assert attached(twin) is None
    assert not twin._forward_pre_hooks
    assert "generate" not in twin.__dict__


@pytest.mark.parametrize("with_processor", [True, False])
def test_a_model_in_a_peft_wrapper(model, processor, with_processor):
    """Attached through the wrapper or before it was put on: the same model, and the same outputs."""
    lora = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["multi_modal_projector"], r=2, init_lora_weights=False
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(copy.deepcopy(model), lora)
    stock = prompt(processor)
    before = wrapped(**stock).logits
    attached_before = copy.deepcopy(wrapped)
    attach(attached_before.get_base_model(), tiny_processor() if with_processor else None, BUDGET)
    assert attach(wrapped, processor if with_processor else None, BUDGET) is wrapped
    assert attached(wrapped).model is wrapped.get_base_model()
    inputs = prompt(processor)
    assert torch.equal(new_tokens(wrapped, inputs), new_tokens(attached_before, inputs))
    assert torch.equal(wrapped(**inputs).logits, attached_before(**inputs).logits)
    assert not torch.equal(wrapped(**inputs).logits[:, -1], before[:, -1])
    detach(wrapped)
    assert torch.equal(wrapped(**stock).logits, before)


def test_processor_survives_pickle_and_saves_as_a_stock_one(model, processor, tmp_path):
    attach(model, processor, BUDGET)
    assert (prompt(pickle.loads(pickle.dumps(processor)))["input_ids"] == IMAGE).sum() == 8
    processor.save_pretrained(tmp_path)
    reloaded = LlavaProcessor.from_pretrained(tmp_path)
    assert (prompt(reloaded)["input_ids"] == IMAGE).sum() == 16
    assert processor._get_num_multimodal_tokens([[32, 32]] * 2)["num_image_tokens"] == [8, 8]


def test_saved_model_says_what_was_attached_and_loads_as_plain_llava(model, processor, tmp_path):
    attach(model, processor, BUDGET)
    model.save_pretrained(tmp_path)
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert ZipConfig(**reloaded.config.visionzip) == BUDGET
    assert attached(reloaded) is None
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), reloaded.state_dict().values(), strict=True)
    )


def test_gradient_reaches_the_projector_and_no_pixel(model, processor):
    attach(model, processor, BUDGET)
    inputs = prompt(processor)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    projector = {f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert projector <= reached
    assert not any("vision_tower" in name for name in reached)
    assert attached(model).projector_names == ["model.multi_modal_projector"]


class TestAuthorsCall:
    """`visionzip(model, dominant, contextual)` with prompts from a stock processor."""

    def test_same_as_attached_with_processor(self, model, processor):
        stock = tiny_processor()
        twin = attach(tiny_llava(), processor, BUDGET)
        assert visionzip(model, dominant=5, contextual=3) is model
        for images, text in [
            (1, "USER: <image> what is this"),
            (2, "USER: <image> how <image>"),
        ]:
            long, short = prompt(stock, text, images), prompt(processor, text, images)
            with torch.no_grad():
                torch.testing.assert_close(model(**long).logits, twin(**short).logits)
            output = model.generate(**long, max_new_tokens=5, do_sample=False)
            assert torch.equal(output[:, : long["input_ids"].shape[1]], long["input_ids"])
            assert torch.equal(output[:, long["input_ids"].shape[1] :], new_tokens(twin, short, 5))

    def test_adjacent_images_and_left_padded_batch(self, model, processor):
        stock = tiny_processor()
        twin = attach(tiny_llava(), processor, BUDGET)
        visionzip(model, 5, 3)
        texts = ["USER: <image><image> what is this", "USER: <image> how many two red blue"]
        images = [square(i) for i in range(3)]
        for maker in (stock, processor):
            maker.tokenizer.padding_side = "left"
        long, short = (p(text=texts, images=images, return_tensors="pt", padding=True) for p in (stock, processor))
        assert torch.equal(new_tokens(model, long, 5), new_tokens(twin, short, 5))
        beams = {"num_beams": 2, "num_return_sequences": 2}
        assert torch.equal(new_tokens(model, long, 5, **beams), new_tokens(twin, short, 5, **beams))
        full = model.generate(**long, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        assert torch.equal(full.sequences[:, : long["input_ids"].shape[1]], long["input_ids"])

    def test_labels_are_shortened_too(self, model, processor):
        stock = tiny_processor()
        twin = attach(tiny_llava(), processor, BUDGET)
        visionzip(model, 5, 3)
        long, short = prompt(stock), prompt(processor)
        losses = []
        for net, inputs in ((model, long), (twin, short)):
            labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
            losses.append(net(**inputs, labels=labels).loss)
        torch.testing.assert_close(*losses)

    def test_turns_on_one_cache(self, model):
        stock = tiny_processor()
        visionzip(model, 5, 3)
        first = prompt(stock)
        output = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        more = torch.cat([output.sequences, torch.tensor([[5, 11, 12, 6]])], dim=1)
        mask = torch.ones_like(more)
        cached = model.generate(
            input_ids=more,
            attention_mask=mask,
            past_key_values=output.past_key_values,
            max_new_tokens=3,
            do_sample=False,
        )
        fresh = model.generate(
            input_ids=more, attention_mask=mask, pixel_values=first["pixel_values"], max_new_tokens=3, do_sample=False
        )
        assert torch.equal(cached, fresh)

    def test_detach(self, model):
        untouched, stock = tiny_llava(), tiny_processor()
        visionzip(model, 5, 3)
        detach(model)
        assert "generate" not in model.__dict__
        assert not model._forward_pre_hooks
        assert torch.equal(model(**prompt(stock)).logits, untouched(**prompt(stock)).logits)


class TestRefused:
    """One clear ValueError each, and nothing changed."""

    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            ({"dominant": 0, "contextual": 1}, "dominant=0"),
            ({"dominant": 17, "contextual": 1}, "makes 17 tokens"),
            ({"dominant": 5, "contextual": -2}, "contextual=-2"),
            ({"dominant": 5, "contextual": 3, "layer": 9}, "3 layers"),
            ({"dominant": 5, "contextual": 3, "layer": 0}, "embeddings"),
            ({"dominant": 5, "contextual": 3, "selector": "best"}, "known: .*visionzip"),
        ],
    )
    def test_budget(self, model, processor, budget, message):
        with pytest.raises(ValueError, match=message):
            attach(model, processor, **budget)
        assert attached(model) is None
        assert "replace_image_token" not in processor.__dict__

    def test_models(self, model, processor):
        with pytest.raises(ValueError, match=r"Linear.*supported model types: .*llava"):
            attach(torch.nn.Linear(2, 2), processor, BUDGET)
        with pytest.raises(ValueError, match="model_type 'llama'"):
            attach(model.model.language_model, processor, BUDGET)
        with pytest.raises(ValueError, match="no language-model head"):
            attach(model.model, processor, BUDGET)

    def test_encoder_without_an_adapter(self, model, processor):
        model.model.vision_tower = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"vision encoder Linear is not supported.*CLIPVisionModel"):
            attach(model, processor, BUDGET)

    @pytest.mark.parametrize(
        ("stranger", "message"),
        [
            (tiny_processor(image=64), r"image size 64 \(the model: 32"),
            (tiny_processor(patch=16), r"patch size 16 \(the model: 8"),
            (tiny_processor().tokenizer, "not a processor for LlavaForConditionalGeneration"),
            ("llava-hf/llava-1.5-7b-hf", "str is not a processor"),
        ],
    )
    def test_processor(self, model, stranger, message):
        with pytest.raises(ValueError, match=message):
            attach(model, stranger, BUDGET)
        assert attached(model) is None

    def test_other_image_token(self, processor):
        model = tiny_llava()
        model.config.image_token_id = 7
        with pytest.raises(ValueError, match=r"image token id 4 \(the model: 7"):
            attach(model, processor, BUDGET)

    def test_processor_of_another_attached_model(self, model, processor):
        attach(model, processor, BUDGET)
        with pytest.raises(ValueError, match="already attached"):
            attach(tiny_llava(), processor, ZipConfig(dominant=3, contextual=1))
        assert (prompt(processor)["input_ids"] == IMAGE).sum() == 8

    def test_processor_of_a_model_that_is_gone(self, processor):
        attach(tiny_llava(), processor, BUDGET)
        gc.collect()
        model = attach(tiny_llava(), processor, ZipConfig(dominant=3, contextual=1))
        assert (prompt(processor)["input_ids"] == IMAGE).sum() == 4
        detach(model)
        assert (prompt(processor)["input_ids"] == IMAGE).sum() == 16

    def test_something_else_on_the_instance(self, model, processor):
        attach(model, processor, BUDGET)
        other = tiny_llava()
        other.model.get_image_features = lambda **_: None
        with pytest.raises(ValueError, match=r"LlavaModel.get_image_features was already replaced"):
            attach(other, tiny_processor(), BUDGET)

    @pytest.mark.parametrize("with_processor", [True, False])
    def test_generate_of_the_instance(self, model, processor, with_processor):
        """Without a processor `generate` is wrapped, and the caller's own would be left out in silence."""
        model.generate = lambda **_: None
        if with_processor:
            attach(model, processor, BUDGET)
            assert detach(model).generate() is None
        else:
            with pytest.raises(ValueError, match=r"\.generate was already replaced"):
                attach(model, None, BUDGET)

    def test_config_and_fields_together(self, model, processor):
        with pytest.raises(ValueError, match="not both"):
            attach(model, processor, BUDGET, dominant=3)

    def test_another_layer_in_the_call(self, model, processor):
        attach(model, processor, BUDGET)
        with pytest.raises(ValueError, match="vision_feature_layer=-1"):
            model(**prompt(processor), vision_feature_layer=-1)
