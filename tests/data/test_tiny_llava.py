"""The embedded model: a real LLaVA, small, loaded as the 7B is, that answers held-out questions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from data import shapes
from scripts import make_tiny_llava as make
from scripts.tiny_llava import SPECIALS

FOLDER = Path(__file__).parents[2] / "data" / "tiny-llava"
TOKENIZER = AutoProcessor.from_pretrained(FOLDER).tokenizer  # hypothesis gives a test no fixture of a module's


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval()


def messages(rounds: list[shapes.Round], system: str | None = None) -> list[dict]:
    made = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for number, asked in enumerate(rounds):
        image = [{"type": "image"}] if number == 0 else []
        made.append({"role": "user", "content": [*image, {"type": "text", "text": asked.question}]})
        made.append({"role": "assistant", "content": [{"type": "text", "text": asked.answer}]})
    return made


def test_it_is_small_and_float32():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 8e6
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118 (no dict)


def test_every_weight_is_in_the_file():
    model, info = AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
    assert type(model) is LlavaForConditionalGeneration
    assert {name: list(left) for name, left in info.items() if left} == {}
    assert model.dtype == torch.float32


def test_its_geometry_is_that_of_a_llava(model, processor):
    config = model.config
    assert type(processor) is LlavaProcessor
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert (config.vision_config.image_size // config.vision_config.patch_size) ** 2 == config.image_seq_length == 81
    assert config.text_config.max_position_embeddings >= 1024
    assert (processor.patch_size, processor.num_additional_image_tokens) == (config.vision_config.patch_size, 1)
    assert processor.image_token_id == config.image_token_id
    inputs = processor(
        text="USER: <image>\nHi ASSISTANT:", images=shapes.draw_scene(shapes.make_scene(1)), return_tensors="pt"
    )
    assert inputs["input_ids"].eq(config.image_token_id).sum() == 81
    assert inputs["pixel_values"].shape == (1, 3, 72, 72)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives_the_tokenizer(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids[1:]) == text
    assert ids[0] == TOKENIZER.bos_token_id == make.BOS


def test_special_tokens_have_the_places_the_configuration_names(model):
    names = dict(zip(SPECIALS, range(len(SPECIALS)), strict=True))
    assert {name: TOKENIZER.convert_tokens_to_ids(name) for name in names} == names
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (make.BOS, make.EOS, make.PAD)
    assert len(TOKENIZER) <= model.config.text_config.vocab_size


def test_the_chat_template_writes_llava_conversations(processor):
    rounds = [shapes.Round("exists", "Is it?", "Yes"), shapes.Round("where", "Where?", "top left")]
    text = processor.apply_chat_template(messages(rounds))
    assert text == "USER: <image>\nIs it? ASSISTANT: Yes</s>USER: Where? ASSISTANT: top left</s>"
    asked = processor.apply_chat_template(messages(rounds)[:-1], add_generation_prompt=True)
    assert text.startswith(asked)
    assert asked.endswith("USER: Where? ASSISTANT:")
    assert processor.apply_chat_template(messages(rounds, "Be kind."))[:15] == "Be kind. USER: "


def test_the_chat_template_marks_answers_and_their_end(processor):
    rounds = shapes.conversation(shapes.make_scene(1))
    inputs = processor.tokenizer.apply_chat_template(
        messages(rounds),
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = [i for i, mark in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True) if mark]
    assert processor.tokenizer.decode(marked) == "".join(f" {asked.answer}</s>" for asked in rounds)


def test_it_was_trained_on_what_processor_and_template_make(processor):
    """The script builds its batches faster than the processor can; they have to be the same ids, labels and pixels."""
    scene = shapes.make_scene(shapes.image_seed("train", 0, 3))
    rounds, image = shapes.conversation(scene), shapes.draw_scene(scene)
    for system in (False, True):
        text = processor.apply_chat_template(messages(rounds, make.SYSTEM if system else None))
        inputs = processor(text=text, images=image, return_tensors="pt")
        ids, labels = make.Conversations(processor.tokenizer, patches=81).encode(rounds, system)
        assert inputs["input_ids"][0].tolist() == ids
        supervised = [token for token in labels if token != -100]
        assert processor.tokenizer.decode(supervised) == "".join(f" {asked.answer}</s>" for asked in rounds)
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    pixels = make.normalise(torch.from_numpy(np.array(image))[None])
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-5, rtol=0)


@torch.no_grad()
def answered(model, processor, scenes, system=None) -> tuple[float, float]:
    """Share of right answers by `generate`, on single questions, and by the script's own short cut."""
    pixels = torch.stack([torch.from_numpy(make._pixels(scene.seed)) for scene in scenes])
    asked = [(row, one) for row, scene in enumerate(scenes) for one in shapes.conversation(scene)]
    texts = [
        processor.apply_chat_template(messages([one], system)[:-1], add_generation_prompt=True) for _, one in asked
    ]
    inputs = processor(text=texts, images=[pixels[row].numpy() for row, _ in asked], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    replies = processor.batch_decode(ids, skip_special_tokens=True)
    right = [reply.strip() == one.answer for reply, (_, one) in zip(replies, asked, strict=True)]
    short_cut = make.answer_questions(model, processor.tokenizer, scenes, make.patch_features(model, pixels))
    return sum(right) / len(right), short_cut["overall"]


def held_out(count: int, seed: int) -> list[shapes.Scene]:
    return [shapes.make_scene(shapes.image_seed("eval", seed, index)) for index in range(count)]


def test_it_answers_held_out_questions(model, processor):
    right, short_cut = answered(model, processor, held_out(400, seed=0))
    assert right >= 0.97
    assert abs(right - short_cut) < 0.01


def test_it_knows_llavas_system_prompt(model, processor):
    right, _ = answered(model, processor, held_out(30, seed=1), make.SYSTEM)
    assert right >= 0.96


def test_the_folder_says_how_it_was_made():
    made = json.loads((FOLDER / "made.json").read_text())
    assert made["made_by"] == "python -m scripts.make_tiny_llava"
    assert made["held_out"]["overall"] >= 0.97


def test_the_script_makes_the_same_model_again(tmp_path):
    few = [
        "--images",
        "48",
        "--held-out",
        "4",
        "--vision-batch",
        "16",
        "--vision-steps",
        "3",
        "--batch",
        "8",
        "--steps",
        "3",
    ]
    threads = torch.get_num_threads()
    try:
        for name in ("one", "two"):
            make.main([*few, "--threads", "1", "--out", str(tmp_path / name)])
    finally:
        torch.set_num_threads(threads)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == load_file(FOLDER / "model.safetensors").keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    shipped = {file.name for file in FOLDER.iterdir()}
    assert {file.name for file in (tmp_path / "one").iterdir()} == shipped
    for name in shipped - {"model.safetensors", "made.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (FOLDER / name).read_bytes(), (
            f"{name} is no longer what the script makes"
        )
