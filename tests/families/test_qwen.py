"""What only Qwen's models have: packed images, windows, DeepStack, positions, frames; and what they refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import slow_qwen
from tests.families.case import Case, make_image, video
from tests.families.case_qwen2_5_vl import CASE as QWEN25
from tests.families.case_qwen2_vl import CASE as QWEN2
from tests.families.case_qwen3_vl import CASE as QWEN3
from train.trainer import images_in
from visionzip import ZipConfig, attach, attached, detach
from visionzip.encoders.qwen import QwenEncoder
from visionzip.families.mrope import expand, runs_of

every = pytest.mark.parametrize("case", [QWEN2, QWEN25, QWEN3], ids=lambda case: case.name)
SIZES = ((280, 196), (140, 308), (70, 60))


def ready(case: Case, config: ZipConfig | None = None) -> tuple[Any, Any]:
    model, processor = case.model(), case.processor()
    return attach(model, processor, config or case.budget), processor


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def last_logits(model: Any, inputs: dict[str, Any], **more: Any) -> tuple[Tensor, Any]:
    """Of the first new token; and the cache."""
    found = model.generate(
        **inputs, **more, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return found.logits[0], found


@every
@torch.no_grad()
def test_encoder_gives_what_the_merger_would_be_given(case: Case) -> None:
    """Bit for bit the untouched model's tokens, once they go through its mergers; whatever sizes are packed together."""
    model, processor = case.model(), case.processor()
    inputs = case.process(processor, [case.prompt(3)], [[make_image(i, size) for i, size in enumerate(SIZES)]])
    stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    visual = model.model.visual
    found = QwenEncoder().encode(visual, inputs["pixel_values"], inputs["image_grid_thw"])
    width = visual.blocks[0].norm1.weight.shape[0]
    for number, frames in enumerate(found):
        merged = visual.merger(frames.features.hidden_states.reshape(-1, width))
        close(merged, stock.pooler_output[number])
        assert len(frames.deep) == len(getattr(visual, "deepstack_merger_list", []))
        for layer, deep in enumerate(frames.deep):
            merger = visual.deepstack_merger_list[layer]
            close(merger(deep.reshape(-1, width)), stock.deepstack_features[layer][number])


@every
@torch.no_grad()
def test_no_scores_where_the_selector_needs_none(case: Case) -> None:
    model, processor = ready(case, ZipConfig(dominant=0.5, contextual=0.1, selector="uniform"))
    inputs = case.process(processor, [case.prompt()], [[make_image(0, SIZES[0])]])
    frames = QwenEncoder().encode(model.model.visual, inputs["pixel_values"], inputs["image_grid_thw"], scores=False)
    assert frames[0].features.scores is None
    assert torch.isfinite(model(**inputs).logits).all()


@every
@torch.no_grad()
def test_everything_kept_is_the_untouched_model(case: Case) -> None:
    """Images, a video and text in one batch, against the untouched model's own forward and generate: positions included."""
    stock, plain = case.model(), case.processor()
    model, processor = ready(case, case.everything())
    texts = [
        f"USER: {case.image_text} what is {case.video_text} this {case.image_text} yes",
        case.prompt(0),
        f"USER: {case.video_text} {case.image_text} how many",
    ]
    images = [[make_image(0, SIZES[0]), make_image(1, SIZES[1])], [], [make_image(2, SIZES[2])]]
    clips = [video(0, case.frames), video(1, case.frames + 2)]
    ours, theirs = (case.process(p, texts, images, clips) for p in (processor, plain))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    there = ours["attention_mask"].bool()
    close(model(**ours).logits[there], stock(**theirs).logits[there])
    close(last_logits(model, ours)[0], last_logits(stock, theirs)[0])
    if "second_per_grid_ts" in ours:  # a clock that runs otherwise is seen
        slower = ours | {"second_per_grid_ts": torch.as_tensor(ours["second_per_grid_ts"]) * 3}
        assert not torch.allclose(model(**slower).logits[there], model(**ours).logits[there], atol=1e-4)


@every
@pytest.mark.parametrize("again", [False, True], ids=["new images", "all images"])
@torch.no_grad()
def test_a_new_image_on_the_cache_of_an_earlier_turn(case: Case, again: bool) -> None:
    """A batch of two conversations; the second turn shows images. Logits are those of computing all of it at once.

    The old images may be passed once more, as the processor gives them, or not.
    """
    model, processor = ready(case)
    texts = [case.prompt(2), case.prompt(0, question="how many red")]
    shown = [[make_image(0, SIZES[0]), make_image(1, SIZES[1])], []]
    first = case.process(processor, texts, shown)
    _, done = last_logits(model, first)
    ids = done.sequences[:, :-1]  # what the cache holds: the last token said has not been read yet
    fresh = [[make_image(2, SIZES[2])], [make_image(3, SIZES[0])]]
    more = case.process(processor, [case.prompt(1, question="is this")] * 2, fresh)

    def joined(name: str, filler: int) -> Tensor:
        old = first[name]
        return torch.cat((old, torch.full((2, ids.shape[1] - old.shape[1]), filler), more[name]), dim=1)

    whole = {
        "input_ids": torch.cat((ids, more["input_ids"]), dim=1),
        "attention_mask": joined("attention_mask", 1),
        "mm_token_type_ids": joined("mm_token_type_ids", 0),
    }
    old = (first["pixel_values"], first["image_grid_thw"])
    new = (more["pixel_values"], more["image_grid_thw"])
    patches, sizes = new[0].split(new[1].prod(-1).tolist()), new[1]
    in_order = {
        "pixel_values": torch.cat((old[0], patches[0], patches[1])),
        "image_grid_thw": torch.cat((old[1], sizes)),
    }
    given = in_order if again else {"pixel_values": new[0], "image_grid_thw": new[1]}
    expected, _ = last_logits(model, whole | in_order)
    model.model.rope_deltas = None
    _, done = last_logits(model, first)
    cache = done.past_key_values
    assert cache.get_seq_length() == ids.shape[1]
    found, _ = last_logits(model, whole | given, past_key_values=cache)
    close(found, expected)


@every
@torch.no_grad()
def test_forward_on_a_cache_by_hand(case: Case) -> None:
    """Two calls of forward, each with an image, and one with text behind them give what one call gives."""
    model, processor = ready(case)
    text = f"USER: {case.image_text} what is this {case.image_text} how many"
    images = [make_image(0, SIZES[0]), make_image(1, SIZES[1])]
    whole = case.process(processor, [text], [images])
    kinds = whole["mm_token_type_ids"][0]
    middle = int((kinds == 0).nonzero()[(kinds == 0).nonzero() > (kinds == 1).nonzero()[0]][0]) + 3
    patches = whole["pixel_values"].split(whole["image_grid_thw"].prod(-1).tolist())
    parts = []
    for number, (start, stop) in enumerate(((0, middle), (middle, len(kinds) - 3), (len(kinds) - 3, len(kinds)))):
        part = {name: whole[name][:, start:stop] for name in ("input_ids", "mm_token_type_ids")}
        if number < 2:  # with a mask of more than its tokens, the untouched model itself does not take text on a cache
            part["attention_mask"] = whole["attention_mask"][:, :stop]
            part |= {"pixel_values": patches[number], "image_grid_thw": whole["image_grid_thw"][number : number + 1]}
        if parts:
            part["past_key_values"] = parts[0].past_key_values
        parts.append(model(**part, use_cache=True))
    close(torch.cat([part.logits for part in parts], dim=1), model(**whole).logits)


@every
def test_a_masked_image_changes_nothing_but_runs_the_projector(case: Case) -> None:
    """A batch of text gets a masked row of placeholders, so that every rank's projector runs; first or last, no matter."""
    model, processor = ready(case)
    text = case.process(processor, [case.prompt(0)])
    blank = case.process(processor, [case.image_text], [[make_image(0, SIZES[2])]])
    width = max(text["input_ids"].shape[1], blank["input_ids"].shape[1])

    def padded(name: str, filler: int) -> list[Tensor]:
        rows = [text[name], blank[name] if name != "attention_mask" else torch.zeros_like(blank[name])]
        return [torch.nn.functional.pad(row, (0, width - row.shape[1]), value=filler) for row in rows]

    expected = model(**text).logits[0]
    for order in ([0, 1], [1, 0]):
        inputs = {name: torch.cat([padded(name, filler)[i] for i in order]) for name, filler in
                  (("input_ids", 3), ("attention_mask", 0), ("mm_token_type_ids", 0))}  # fmt: skip
        media = {name: blank[name] for name in ("pixel_values", "image_grid_thw")}
        labels = torch.full_like(inputs["input_ids"], -100)
        row = order.index(0)
        labels[row, 1:4] = inputs["input_ids"][row, 1:4]
        model.zero_grad()
        output = model(**inputs, **media, labels=labels)
        close(output.logits[row, : expected.shape[0]], expected)
        output.loss.backward()
        merger = model.get_submodule(attached(model).projector_names[0])
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in merger.parameters())


@pytest.mark.parametrize("merge", ["mean", "none"])
@torch.no_grad()
def test_other_ways_to_merge(merge: Any) -> None:
    model, processor = ready(QWEN25, ZipConfig(dominant=0.5, contextual=0.1, merge=merge))
    inputs = QWEN25.process(processor, [QWEN25.prompt()], [[make_image(0, SIZES[0])]])
    found = attached(model).project(attached(model).compress(**QWEN25.image_inputs(inputs)))[0]
    untouched = QWEN25.model("eager")
    grid = inputs["image_grid_thw"]
    maps, output = slow_qwen.last_maps(untouched, inputs["pixel_values"], grid, "image")
    kept, members = slow_qwen.choose(untouched, grid[0].tolist(), maps, ZipConfig(dominant=0.5, contextual=0.1))[0]
    every_group = output.pooler_output[0]
    tokens = {group: every_group[group] for group in kept}
    for target, others in members.items():
        group = [target, *others] if merge == "mean" else [target]
        tokens[target] = torch.stack([every_group[member] for member in group]).mean(0)
    close(found, torch.stack([tokens[place] for place in sorted(tokens)]))


@every
def test_images_are_counted_not_their_patches(case: Case) -> None:
    """Pixels are flat patches here; a run's log said thousands of images a second."""
    model, processor = ready(case)
    inputs = case.process(processor, [case.prompt()] * 2, [[make_image(0, SIZES[0])], [make_image(1, SIZES[0])]])
    assert len(inputs["pixel_values"]) > 100
    assert images_in(attached(model).family, dict(inputs)) == 2
    tokens = attached(model).compress(**case.image_inputs(inputs))
    assert images_in(attached(model).family, {"visual_tokens": tokens, "image_grid_thw": inputs["image_grid_thw"]}) == 2


@every
def test_what_a_cached_image_holds(case: Case) -> None:
    """All groups while tokens are merged, the chosen ones alone when the rest is dropped; whole numbers stay whole."""
    model, processor = ready(case)
    inputs = case.process(processor, [case.prompt()], [[make_image(0, SIZES[0])]])
    groups = int(inputs["image_grid_thw"].prod()) // 4
    merged = attached(model).compress(**case.image_inputs(inputs))[0]
    assert merged["groups"].shape[1] == groups
    attach(model, processor, ZipConfig(dominant=0.25, contextual=0))
    alone = attached(model).compress(**case.image_inputs(inputs))[0]
    assert alone["groups"].shape[1] == alone["kept"].shape[1] == int(0.25 * groups)
    assert not any(value.requires_grad for value in alone.values())
    assert {merged[name].dtype for name in ("grid", "kept", "targets", "slots")} == {torch.int64}
    assert merged["weights"].dtype == torch.int32  # bits of float32: a cache in half precision would round floats
    weights = merged["weights"].view(torch.float32)
    others = (merged["slots"] == merged["targets"][:, :1]) & (weights < 1)
    assert weights[others].sum().item() == pytest.approx(1, abs=1e-6)  # with `add` the others of a group are a mean


@every
def test_placeholders_are_asked_for_by_place_or_by_name(case: Case) -> None:
    """The data pipeline asks by place."""
    _, processor = ready(case)
    clips = processor.video_processor([video(0, 2, (112, 112)), video(1, 4, (224, 112))])
    by_place = [processor.replace_video_token(clips, index) for index in range(2)]
    assert by_place == [processor.replace_video_token(clips, video_idx=index) for index in range(2)]
    counts = [text.count("<|video_pad|>") for text in by_place]
    grids = clips["video_grid_thw"].tolist()
    assert counts == [t * sum(case.budget.resolve(h * w // 4)) for t, h, w in grids]
    found = processor.image_processor(images=[make_image(0, SIZES[0]), make_image(1, SIZES[1])], return_tensors="pt")
    assert processor.replace_image_token(found, 1) == processor.replace_image_token(found, image_idx=1)
    assert processor.replace_image_token(found, 0) != processor.replace_image_token(found, 1)


@every
@torch.no_grad()
def test_an_image_smaller_than_the_budget_keeps_all_it_has(case: Case) -> None:
    model, processor = ready(case, ZipConfig(dominant=54, contextual=10))
    sizes = ((60, 60), (280, 280))
    inputs = case.process(processor, [case.prompt(2)], [[make_image(i, size) for i, size in enumerate(sizes)]])
    counts = attached(model).token_counts(**case.image_inputs(inputs))
    assert counts == [(case.groups(size), min(64, case.groups(size))) for size in sizes]
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == sum(now for _, now in counts)
    assert torch.isfinite(model(**inputs).logits).all()


@every
@torch.no_grad()
def test_token_types_are_made_where_none_are_given(case: Case) -> None:
    """A batch whose ids come from a template of ours has none."""
    model, processor = ready(case)
    inputs = case.process(
        processor, [case.prompt(2), case.prompt(0)], [[make_image(i, SIZES[i]) for i in range(2)], []]
    )
    without = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    there = inputs["attention_mask"].bool()
    assert torch.equal(model(**without).logits[there], model(**inputs).logits[there])
    assert torch.equal(last_logits(model, without)[0], last_logits(model, inputs)[0])


@every
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_are_attached_to_themselves(case: Case, clone: Any) -> None:
    model, processor = ready(case)
    inputs = case.process(processor, [case.prompt()], [[make_image(0, SIZES[0])]])
    expected = model(**inputs).logits
    twin = clone(model)
    detach(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(**inputs).logits, expected)
    generated = twin.generate(**inputs, max_new_tokens=2, do_sample=False)
    detach(twin)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 2
    assert not twin.model._forward_pre_hooks


@every
@torch.no_grad()
def test_static_cache_and_text_after_images(case: Case) -> None:
    model, processor = ready(case)
    inputs = case.process(processor, [case.prompt()], [[make_image(0, SIZES[0])]])
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    static = model.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)
    text = case.process(processor, [case.prompt(0)])
    close(model(**text).logits, case.model()(**text).logits)  # nothing is left of the image's positions


class TestRefusals:
    def test_another_layer(self) -> None:
        with pytest.raises(ValueError, match=r"layer=-2.*last layer"):
            attach(QWEN2.model(), QWEN2.processor(), ZipConfig(dominant=0.5, contextual=0, layer=-2))

    def test_a_last_block_with_windows(self) -> None:
        config = QWEN25.config()
        config.vision_config.fullatt_block_indexes = [1]
        from transformers import AutoModelForImageTextToText

        with pytest.raises(ValueError, match="no full attention"):
            attach(AutoModelForImageTextToText.from_config(config), QWEN25.processor(), dominant=0.5, contextual=0)

    def test_another_models_processor(self) -> None:
        with pytest.raises(ValueError, match=r"patch size 16 .the model: 14"):
            attach(QWEN2.model(), QWEN3.processor(), dominant=0.5, contextual=0)

    def test_no_processor(self) -> None:
        with pytest.raises(ValueError, match="needs its processor"):
            attach(QWEN2.model(), dominant=0.5, contextual=0)

    @every
    def test_prompt_of_a_stock_processor(self, case: Case) -> None:
        model, _ = ready(case)
        inputs = case.process(case.processor(), [case.prompt()], [[make_image(0, SIZES[0])]])
        with pytest.raises(ValueError, match="processor that is attached"):
            model(**inputs)
        with pytest.raises(ValueError, match="processor that is attached"):
            model.generate(**inputs, max_new_tokens=1)

    def test_pixels_that_do_not_fit_their_grids(self) -> None:
        model, processor = ready(QWEN2)
        inputs = QWEN2.process(processor, [QWEN2.prompt()], [[make_image(0, SIZES[0])]])
        with pytest.raises(ValueError, match="patches were given, but the grids"):
            attached(model).compress(pixel_values=inputs["pixel_values"][4:], image_grid_thw=inputs["image_grid_thw"])
        with pytest.raises(ValueError, match="pixel_values was given without image_grid_thw"):
            attached(model).compress(pixel_values=inputs["pixel_values"])

    def test_tokens_that_do_not_say_what_was_kept(self) -> None:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        model, processor = ready(QWEN2)
        inputs = QWEN2.process(processor, [QWEN2.prompt()], [[make_image(0, SIZES[0])]])
        tokens = attached(model).project(attached(model).compress(**QWEN2.image_inputs(inputs)))
        with pytest.raises(ValueError, match="does not say which tokens were kept"):
            model(
                input_ids=inputs["input_ids"],
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tokens)},
            )

    def test_budget_of_no_image_in_particular(self) -> None:
        model, _ = ready(QWEN2)
        with pytest.raises(ValueError, match="token_counts"):
            attached(model).family.budget(QWEN2.budget)


def test_expand_by_hand() -> None:
    """One image of 2 × 3 groups of which 0, 2 and 5 are kept, between text; then one that is masked."""
    grids = torch.tensor([[1, 4, 6], [1, 4, 4]])
    runs = {1: runs_of([torch.tensor([[0, 2, 5]]), torch.tensor([[1]])], grids, 2, False), 2: iter(())}
    row, shown = expand([0, 1, 1, 1, 0, 1, 0], [True] * 5 + [False, True], runs)
    assert row.kinds == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert row.kept == [0, 1, 3, 6, 7, 8]
    assert shown == [(1, 0)]
