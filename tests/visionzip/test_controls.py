"""`pooled` and `scaled`: the controls that select nothing, against slow versions and the untouched model on a smaller image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families.case import cases
from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import attach, attached
from visionzip.compress import DROPPED, compress
from visionzip.selectors import Features
from visionzip.selectors.pooled import cells


@settings(max_examples=60, deadline=None, derandomize=True)
@given(patches=st.integers(1, 100), data=st.data())
def test_cells_are_rectangles_that_divide_the_grid(patches, data):
    count = data.draw(st.integers(1, patches))
    cell, middles = cells(patches, count)
    assert sorted(set(cell)) == list(range(count))
    assert middles == sorted(set(middles))
    assert [cell[place] for place in middles] == list(range(count))
    columns = patches // next(rows for rows in range(int(patches**0.5), 0, -1) if patches % rows == 0)
    for number in range(count):
        places = [divmod(place, columns) for place in range(patches) if cell[place] == number]
        rows, wide = ({axis[way] for axis in places} for way in (0, 1))
        assert len(places) == len(rows) * len(wide)
        assert all(max(side) - min(side) + 1 == len(side) for side in (rows, wide))


def test_cells_by_hand():
    assert cells(16, 4) == ([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3], [0, 2, 8, 10])
    assert cells(6, 3)[0] == [0, 1, 2, 0, 1, 2]  # 2 × 3 patches in one band
    assert cells(30, 30)[0] == list(range(30))


def test_pooled_is_the_mean_of_each_cell():
    torch.manual_seed(0)
    features = Features(torch.randn(2, 17, 5), torch.randn(2, 17, 3), None, True)
    result = compress(features, 3, 1, selector="pooled")
    grid = features.hidden_states[:, 1:].reshape(2, 4, 4, 5)
    for place, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        mean = grid[:, row : row + 2, column : column + 2].mean(dim=(1, 2))
        torch.testing.assert_close(result.tokens[:, place], mean)
    assert result.slots[0].tolist() == [DROPPED, 0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert result.kept[0].tolist() == [1, 3, 9]
    assert result.targets[0].tolist() == [11]
    with pytest.raises(ValueError, match="pooled makes at most one token per patch: 17 requested, 16 patches"):
        compress(features, 16, 1, selector="pooled")


@torch.no_grad()
def test_scaled_is_the_untouched_model_on_a_smaller_image():
    model, processor = tiny_llava(image=64), tiny_processor(image=64)
    attach(model, processor, dominant=7, contextual=2, selector="scaled")
    inputs = processor(text="USER: <image> what is this", images=make_image(size=(64, 64)), return_tensors="pt")
    assert int((inputs["input_ids"] == 4).sum()) == 9
    small = torch.nn.functional.interpolate(inputs["pixel_values"], size=(24, 24), mode="bicubic", antialias=True)
    stock = tiny_llava(image=64)
    hidden = stock.model.vision_tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
    found = attached(model).compress(pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(found[0], hidden[0, 1:])
    embeds = stock.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == 4] = stock.model.multi_modal_projector(hidden[0, 1:])
    torch.testing.assert_close(model(**inputs).logits, stock(inputs_embeds=embeds).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("budget", "tokens"), [((13, 3), 16), ((27, 5), 30), ((6, 2), 8), ((54, 10), 64)])
def test_scaled_keeps_the_largest_grid_of_the_budget(budget, tokens):
    model, processor = tiny_llava(image=72), tiny_processor(image=72)
    attach(model, processor, dominant=budget[0], contextual=budget[1], selector="scaled")
    assert processor.replace_image_token({}, 0).count("<image>") == tokens
    assert len(attached(model).compress(pixel_values=torch.randn(1, 3, 72, 72))[0]) == tokens


def test_other_families_are_refused():
    case = next(case for case in cases() if case.name == "LLaVA-NeXT")
    for selector in ("pooled", "scaled"):
        with pytest.raises(ValueError, match=f"does not support selector={selector}"):
            attach(case.model(), case.processor(), case.budget.model_copy(update={"selector": selector}))
