"""What families with groups of patches have of their own: shuffles, pooling, tiles, frames; and what they refuse."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import InternVLVisionConfig, InternVLVisionModel

from scripts.grouping import measure
from tests.families.case import Case, make_image
from tests.families.case_gemma3 import CASE as GEMMA
from tests.families.case_idefics3 import CASE as IDEFICS
from tests.families.case_internvl import CASE as INTERNVL
from tests.families.case_paligemma import CASE as PALIGEMMA
from tests.families.case_smolvlm import CASE as SMOLVLM
from tests.families.slow_grouped import members
from visionzip import ZipConfig, attach, attached, detach, visionzip
from visionzip.encoders import encoder_for
from visionzip.families import family_for
from visionzip.families.gemma3 import unpool
from visionzip.families.grouped import group_mean

CASES = [INTERNVL, GEMMA, PALIGEMMA, IDEFICS, SMOLVLM]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def ready(case: Case, config: ZipConfig | None = None) -> tuple[Any, Any]:
    model, processor = case.model(), case.processor()
    return attach(model, processor, config or case.budget), processor


def one(case: Case, processor: Any, seed: int = 0) -> dict[str, Any]:
    return case.process(processor, [case.prompt()], [[make_image(seed, case.sizes[0])]])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [INTERNVL, IDEFICS, SMOLVLM], ids=lambda case: case.name)
def test_a_shuffled_token_is_made_of_the_patches_of_its_group(case: Case) -> None:
    """What scores are averaged over is what the model itself puts side by side."""
    model = case.model()
    family = family_for(model)
    side = family.side
    length = 6 * side
    patches = torch.arange(length**2, dtype=torch.float32).reshape(1, -1, 1).expand(-1, -1, 4)  # each says its number
    tokens = family.join(patches.contiguous())[0]
    groups = members(length, side)
    assert [sorted(set(token.tolist())) for token in tokens] == [sorted(group) for group in groups]
    means = group_mean(patches[..., :1], side)[0, :, 0]
    close(means, torch.tensor([sum(group) / len(group) for group in groups]))


def test_pooled_tokens_are_means_of_their_groups() -> None:
    model = GEMMA.model()
    patches = torch.randn(2, 64**2, 3, generator=torch.Generator().manual_seed(0))
    close(family_for(model).join(patches), group_mean(patches, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 16, 40])
def test_unpooled_tokens_come_back_exactly(count: int, dtype: torch.dtype) -> None:
    """Through the pooling that Gemma's projector does, bit for bit, in any precision."""
    tokens = torch.randn(count, 5, generator=torch.Generator().manual_seed(count)).to(dtype)
    sheets = unpool(tokens, length=4, side=4)
    assert sheets.shape[1:] == (256, 5)
    square = sheets.transpose(1, 2).unflatten(2, (16, 16))
    pooled = torch.nn.functional.avg_pool2d(square.float(), 4).to(dtype).flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.equal(pooled[:count], tokens)
    assert not pooled[count:].any()


@pytest.mark.parametrize("large", [False, True], ids=["300M", "6B"])
@torch.no_grad()
def test_internvit_equals_the_model(large: bool) -> None:
    """Hidden states bit for bit, scores and keys of the eager maps; the 6B has norms of q and k, and RMS norms."""
    config = InternVLVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=(56, 56),
        patch_size=(14, 14), use_qk_norm=large, norm_type="rms_norm" if large else "layer_norm",
        attention_bias=not large, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    tower = InternVLVisionModel(config).eval()
    for parameter in tower.parameters():  # positions and norms start at 0 and 1
        parameter.add_(torch.randn_like(parameter) * 0.1)
    pixels = torch.randn(2, 3, 56, 56)
    stock = tower(pixels, output_hidden_states=True, output_attentions=True)
    encoder = encoder_for(tower)
    assert encoder.tokens(tower) == 17
    for layer in (-1, -2, 1):
        features = encoder.encode(tower, pixels, layer)
        number = layer if layer > 0 else 4 + layer
        assert torch.equal(features.hidden_states, stock.hidden_states[number])
        torch.testing.assert_close(features.scores, stock.attentions[number - 1].mean(dim=(1, 2)), rtol=1e-5, atol=1e-6)
    block = tower.encoder.layer[0]
    keys = block.attention.k_norm(block.attention.k_proj(block.layernorm_before(stock.hidden_states[0])))
    close(encoder.encode(tower, pixels, 1).metric, keys.unflatten(-1, (4, 8)).mean(2))
    both = encoder.encode(tower, pixels, [1, -1])
    assert torch.equal(both.hidden_states, torch.cat([stock.hidden_states[1], stock.hidden_states[3]], dim=-1))


@torch.no_grad()
def test_internvl_with_a_last_norm_and_with_another_layer() -> None:
    """`use_mean_pooling=False` has a norm that counts for layer -1 alone, in the untouched model as here."""
    from transformers import AutoModelForImageTextToText

    config = INTERNVL.config()
    config.vision_config.use_mean_pooling = False
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.model.vision_tower.layernorm.weight.mul_(3)
    processor = INTERNVL.processor()
    inputs = one(INTERNVL, processor)
    for layer in (-1, -2, 2):
        detach(model)
        expected = model.model.get_image_features(inputs["pixel_values"], vision_feature_layer=layer).pooler_output
        attach(model, processor, ZipConfig(dominant=256, contextual=0, layer=layer))
        attachment = attached(model)
        close(torch.stack(attachment.project(attachment.compress(**INTERNVL.image_inputs(inputs)))), expected)
        with pytest.raises(ValueError, match="vision_feature_layer=1 was requested"):
            model.model.get_image_features(inputs["pixel_values"], vision_feature_layer=1)


@pytest.mark.parametrize("case", [INTERNVL, SMOLVLM], ids=lambda case: case.name)
def test_frames_of_a_video_have_a_tiles_budget(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models take frames among the tiles; the text around them stays the processor's own."""
    model, processor = case.model(), case.processor()
    processor.video_processor = object()
    times = SimpleNamespace(fps=1.0, timestamps=[0.0, 1.0, 2.0], duration=3.0)
    frames = {"pixel_values_videos": [torch.zeros(3, 3, 448, 448)], "pixel_values": torch.zeros(1, 3, 3, 384, 384)}
    frames["video_metadata"] = [times]  # type: ignore[assignment]
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str, raising=False)
    stock = processor.replace_video_token(frames, 0)
    attach(model, processor, case.budget)
    now = processor.replace_video_token(frames, 0)
    token = processor.image_token
    assert stock.count(token) == 3 * family_for(model).groups
    assert now.count(token) == 3 * sum(family_for(model).budget(case.budget))
    assert now.replace(token, "") == stock.replace(token, "")


def test_pan_and_scan_crops_are_images_of_their_own() -> None:
    model, processor = ready(GEMMA)
    shown = [[make_image(0, (900, 300))]]
    made = processor(
        text=[GEMMA.prompt()], images=shown, return_tensors="pt", do_pan_and_scan=True,
        pan_and_scan_min_crop_size=100, pan_and_scan_max_num_crops=4, pan_and_scan_min_ratio_to_activate=1.2,
    )  # fmt: skip
    images = len(made["pixel_values"])
    assert images > 1
    assert int((made["input_ids"] == model.config.image_token_id).sum()) == images * sum((27, 5))
    assert torch.isfinite(model(**made).logits).all()


@every
@torch.no_grad()
def test_authors_call_without_a_processor(case: Case) -> None:
    """Prompts of a stock processor are shortened on their way in, with all that is as long as they are."""
    twin, processor = ready(case)
    model = visionzip(case.model(), dominant=27, contextual=5)
    stock = case.processor()
    for texts, shown in (
        ([case.prompt()], [[make_image(0, case.sizes[0])]]),
        ([case.prompt(1), case.prompt(0, question="how many red")], [[make_image(1, case.sizes[1])], []]),
    ):
        long, short = (case.process(p, texts, shown) for p in (stock, processor))
        assert long["input_ids"].shape[1] > short["input_ids"].shape[1]
        ours, theirs = model(**long).logits, twin(**short).logits
        for row, length in enumerate(
            short["attention_mask"].sum(dim=1).tolist()
        ):  # padded on the left, not equally far
            close(ours[row, -length:], theirs[row, -length:])
        found = model.generate(**long, max_new_tokens=3, do_sample=False)[:, long["input_ids"].shape[1] :]
        expected = twin.generate(**short, max_new_tokens=3, do_sample=False)[:, short["input_ids"].shape[1] :]
        assert torch.equal(found, expected)


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_are_attached_to_themselves(case: Case, clone: Any) -> None:
    model, processor = ready(case)
    inputs = one(case, processor)
    expected = model(**inputs).logits
    twin = clone(model)
    detach(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(**inputs).logits, expected)
    assert "get_image_features" not in detach(twin).model.__dict__


class TestRefusals:
    @every
    def test_more_than_there_is(self, case: Case) -> None:
        with pytest.raises(ValueError, match="the encoder makes"):
            attach(case.model(), case.processor(), dominant=5000, contextual=10)

    @every
    def test_a_layer_that_does_not_exist(self, case: Case) -> None:
        with pytest.raises(ValueError, match="layer 7 does not exist"):
            attach(case.model(), case.processor(), ZipConfig(dominant=5, contextual=1, layer=7))

    @pytest.mark.parametrize(
        ("case", "name"), [(INTERNVL, "image_seq_length"), (IDEFICS, "image_seq_len"), (PALIGEMMA, "image_seq_length")]
    )
    def test_another_models_processor(self, case: Case, name: str) -> None:
        processor = case.processor()
        setattr(processor, name, 7)
        with pytest.raises(ValueError, match=r"placeholders per tile 7 .the model: \d+"):
            attach(case.model(), processor, case.budget)

    def test_something_that_is_no_processor(self) -> None:
        with pytest.raises(ValueError, match="is not a processor for Gemma3"):
            attach(GEMMA.model(), GEMMA.processor().image_processor, GEMMA.budget)

    def test_a_tile_that_is_padded(self) -> None:
        model, processor = ready(IDEFICS)
        inputs = one(IDEFICS, processor)
        inputs["pixel_attention_mask"][0, 0, :50] = 0
        with pytest.raises(ValueError, match="masks a part of a tile"):
            model(**inputs)

    def test_several_layers_at_once(self) -> None:
        from transformers import AutoModelForImageTextToText

        config = INTERNVL.config()
        config.vision_feature_layer = [-1, -2]
        with pytest.raises(ValueError, match="reads one layer"):
            attach(AutoModelForImageTextToText.from_config(config), INTERNVL.processor(), INTERNVL.budget)


@torch.no_grad()
def test_gemma_lets_images_attend_both_ways_without_being_told() -> None:
    """A batch whose ids come from a template of ours has no token types."""
    model, processor = ready(GEMMA)
    inputs = GEMMA.process(
        processor, [GEMMA.prompt(2), GEMMA.prompt(0)], [[make_image(i, (320, 240)) for i in range(2)], []]
    )
    without = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    there = inputs["attention_mask"].bool()
    found, expected = model(**without).logits[there], model(**inputs).logits[there]
    assert torch.equal(found, expected)
    causal = model(**without, token_type_ids=torch.zeros_like(inputs["input_ids"])).logits[there]
    assert not torch.allclose(causal, expected, atol=1e-4)
    answers = [model.generate(**given, max_new_tokens=3, do_sample=False) for given in (inputs, without)]
    assert torch.equal(*answers)


@torch.no_grad()
def test_paligemma_takes_the_suffix_from_the_labels() -> None:
    """What comes after an answer does not reach it: neither a later question nor a later answer."""
    model, processor = ready(PALIGEMMA)
    inputs = one(PALIGEMMA, processor)
    ids = torch.cat((inputs["input_ids"], torch.tensor([[10, 11, 5, 12, 13]])), dim=1)  # answer, question, answer
    labels = torch.full_like(ids, -100)
    prompt = inputs["input_ids"].shape[1]
    labels[:, prompt : prompt + 2] = ids[:, prompt : prompt + 2]
    labels[:, -2:] = ids[:, -2:]
    media = PALIGEMMA.image_inputs(inputs)

    def answered(ids: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **media).logits[:, : prompt + 2]

    later = ids.clone()
    later[:, prompt + 2 :] = torch.tensor([[6, 7, 8]])
    close(answered(later), answered(ids))
    told = torch.cat((torch.zeros(1, prompt), torch.ones(1, 5)), dim=1).long()
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=told, **media).logits
    close(answered(ids), expected[:, : prompt + 2])


def test_the_script_that_counts_groups() -> None:
    """A 4 × 4 grid in groups of 2 × 2: the best quarter of the patches fills one group, or touches all four."""
    whole = torch.zeros(4, 4)
    whole[:2, :2] = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    spread = torch.zeros(4, 4)
    spread[::2, ::2] = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    found = [{row[0]: row[1:] for row in measure(scores.reshape(1, 16), 2)}[0.25] for scores in (whole, spread)]
    assert found[0] == (0.25, 0.25, 1.0, 1.0)
    assert found[1] == pytest.approx((1.0, 0.0, 1.0, 0.4))
