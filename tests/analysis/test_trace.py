"""What is said to be kept is what the model is given, for every family."""

import numpy as np
import pytest
import torch

from tests.families.case import cases, make_image, video
from tests.tiny import make_image as noise
from tests.tiny import tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached
from visionzip.analysis.trace import KEPT, image_inputs, to_model, trace, trace_inputs, trace_video
from visionzip.compress import DROPPED

CASES = cases()


def length(sequence):
    """Tokens of one image as `Attachment.compress` gives it; Qwen's is a dict."""
    return sequence["kept"].numel() if isinstance(sequence, dict) else len(sequence)


def likeness(one, other):
    """Correlation of two images' pixels."""
    there, here = (np.asarray(image.convert("RGB").resize((64, 64)), dtype=float).ravel() for image in (one, other))
    return np.corrcoef(there, here)[0, 1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_family(case):
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    shown = make_image(0, case.sizes[0])
    found = trace(model, shown, name="x")
    sequences = attached(model).compress(**to_model(model, image_inputs(processor, shown)))
    assert found.tokens == sum(length(sequence) for sequence in sequences)
    assert found.tokens <= found.of_tokens
    # Video-LLaVA and the like make a sequence of all tiles, each with the whole budget
    assert sum(len(tile.kept) + len(tile.targets) for tile in found.tiles) == found.tokens
    for tile in found.tiles:
        assert tile.groups.shape == tile.grid
        assert tile.patches == tile.features.hidden_states.shape[1] - tile.cls
        assert int(tile.kept_mask.sum()) == len(tile.kept) - tile.cls
        assert set(tile.groups.flatten().tolist()) == {KEPT, *range(len(tile.targets))}
        for group, patch in enumerate(tile.target_patches):
            assert int(tile.groups.flatten()[patch]) == group
        assert float(tile.attention.sum()) == pytest.approx(1, abs=1e-4)
        width, height = tile.image.size
        assert width * tile.grid[0] == pytest.approx(height * tile.grid[1], rel=0.05)  # patches are square


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pixels_that_are_ready_show_the_same_image(case):
    """A run has no image any more, only what goes into the model; for Qwen that is a list of patches in an order of its own."""
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    shown = make_image(0, case.sizes[0])
    known = trace(model, shown).tiles[0]
    found = trace_inputs(attached(model), processor, image_inputs(processor, shown)).tiles[0]
    assert torch.equal(found.kept, known.kept)
    assert likeness(found.image, known.image) > 0.95
    if "Qwen" in case.name:
        assert likeness(found.image, shown) > 0.95


@pytest.mark.parametrize("case", [case for case in CASES if case.frames], ids=lambda case: case.name)
def test_every_frame_of_a_video(case):
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    frames = video(0, case.frames)
    found = trace_video(model, frames)
    assert len(found.tiles) in (case.frames, -(-case.frames // 2))  # Qwen makes one of two
    assert found.tokens == case.video_count(case.budget, case.frames)
    if "Qwen" in case.name:  # pixels come as flat patches there, in an order of their own
        assert all(likeness(tile.image, frames[2 * place]) > 0.8 for place, tile in enumerate(found.tiles))
        assert likeness(found.tiles[0].image, frames[-1]) < 0.2


def test_frames_are_images_where_the_model_has_no_way_for_videos(model, processor):
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    found = trace_video(model, [noise(0), noise(1), noise(2)])
    assert (len(found.tiles), found.tokens, found.of_tokens) == (3, 24, 48)
    assert not torch.equal(found.tiles[0].kept, found.tiles[1].kept) or not torch.equal(
        found.tiles[1].kept, found.tiles[2].kept
    )


def test_shows_the_pixels_the_encoder_saw(model, processor):
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    square = noise(3, (32, 32))  # nothing to resize or crop
    (tile,) = trace(model, square).tiles
    assert np.abs(np.asarray(tile.image).astype(int) - np.asarray(square)).max() <= 1


@pytest.mark.parametrize("selector", ["visionzip", "divprune", "uniform"])
@pytest.mark.parametrize("merge", ["add", "none"])
def test_another_budget_without_the_encoder(model, processor, selector, merge):
    """Also from a trace of a selector that needs no scores: they are asked for while somebody looks."""
    attach(model, processor, ZipConfig(dominant=9, contextual=1, selector="random"))
    other = ZipConfig(dominant=5, contextual=3, selector=selector, merge=merge)
    again = trace(model, noise(1)).tiles[0].again(other)
    attach(model, processor, other)
    fresh = trace(model, noise(1)).tiles[0]
    assert torch.equal(again.slots, fresh.slots)
    assert torch.equal(again.kept, fresh.kept)
    if merge == "none":
        assert DROPPED in fresh.groups


def test_share_held_is_what_the_kept_patches_hold(model, processor):
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    (tile,) = trace(model, noise(2)).tiles
    scores = tile.features.scores[0, 1:]
    best = scores.sort(descending=True).values[:4].sum() / scores.sum()
    assert tile.held == pytest.approx(float(best), rel=1e-5)


def test_listening_changes_nothing(model, processor):
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    inputs = image_inputs(processor, noise(4))
    before = attached(model).compress(**inputs)[0]
    trace(model, noise(4))
    assert torch.equal(before, attached(model).compress(**inputs)[0])


def test_nothing_attached():
    with pytest.raises(ValueError, match="nothing is attached"):
        trace(tiny_llava(), noise(0), tiny_processor())
    model = attach(tiny_llava(), None, ZipConfig(dominant=5, contextual=3))
    with pytest.raises(ValueError, match="processor"):
        trace(model, noise(0))
