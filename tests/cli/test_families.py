"""Chat and every export format on every family: real checkpoints' shapes, random weights."""

import pytest
import torch

from tests.families.case import cases, make_image
from visionzip import attach, save
from visionzip.chat import Chat
from visionzip.export import load_into, read_export
from visionzip.inputs import batch_prompts, text_inputs
from visionzip.projector import projector_state

CASES = cases()
M_ROPE = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL")  # transformers has no positions for a new image on an old cache


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def family(request):
    model, processor = request.param.model(), request.param.processor()
    model.generation_config.eos_token_id = None
    return request.param.name, attach(model, processor, request.param.budget), processor


def test_three_turns_with_two_images(family):
    name, model, processor = family
    chat = Chat(model, processor, max_new_tokens=3)
    chat.show(make_image(0, (200, 160)))
    first, second = chat.ask("what is this"), chat.ask("is a red")
    chat.show(make_image(1, (160, 200)))
    third = chat.ask("how many")
    new = 2 if name in M_ROPE else 1  # elsewhere the first image stays in the cache
    assert [turn.encoded for turn in (first, second, third)] == [1, 0, new]
    assert second.prefilled < second.prompt - first.images[0][0]
    assert first.images[0][0] < first.images[0][1]
    row = text_inputs(processor, chat._prompt(chat.messages[:-1], chat.images).tolist())
    inputs = {**batch_prompts(processor, [row]), **chat._pixels(chat.images)}
    with torch.no_grad():
        anew = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, use_cache=False, suppress_tokens=chat.family.placeholder_ids
        )
    new_ids = anew[0, inputs["input_ids"].shape[1] :]
    assert third.text == processor.tokenizer.decode(new_ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["safetensors", "peft", "merged"])
def test_what_was_trained_comes_back(family, tmp_path, name):
    _, model, _ = family
    out = save(model, tmp_path / "out", name)
    state = projector_state(model)
    stored = read_export(out).projector
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], value) for key, value in state.items())
    load_into(model, out)
