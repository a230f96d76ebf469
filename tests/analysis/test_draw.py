"""Images say what the tensors say, in colours that can be told apart."""

import itertools

import numpy as np
import pytest

from tests.tiny import make_image
from visionzip import ZipConfig, attach
from visionzip.analysis import draw
from visionzip.analysis.trace import KEPT, trace

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour):
    values = np.array(colour) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    ratio = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_group_colours_are_told_apart_by_everyone(kind):
    for one, other in itertools.combinations(draw.GROUP_COLOURS, 2):
        seen = [lab(np.array(BLINDNESS[kind]) @ linear(colour)) for colour in (one, other)]
        assert np.linalg.norm(seen[0] - seen[1]) > 10, (kind, one, other)  # 2.3 is just noticeable


def test_numbers_can_be_read_on_every_colour():
    for colour in itertools.product(range(0, 256, 51), repeat=3):
        behind, ink = [float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (colour, draw.text_on(colour))]
        assert (max(behind, ink) + 0.05) / (min(behind, ink) + 0.05) >= 4.5  # WCAG 2, AA


@pytest.fixture
def tile(model, processor):
    attach(model, processor, ZipConfig(dominant=6, contextual=3))
    return trace(model, make_image(0)).tiles[0]


def cells(image, tile):
    cell = draw.cell_size(tile.grid)
    pixels = np.asarray(image).astype(int)
    return {
        (row, column): pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        for row, column in np.ndindex(*tile.grid)
    }


def test_kept_patches_are_as_they_were_and_the_rest_is_whitened(tile):
    before, after = cells(draw.enlarge_tile(tile), tile), cells(draw.draw_kept(tile), tile)
    inner = np.s_[20:-20, 20:-20]  # inside of the frame
    for place, mask in np.ndenumerate(tile.kept_mask.numpy()):
        if mask:
            assert np.array_equal(after[place][inner], before[place][inner])
            assert tuple(after[place][0, 0]) == draw.MARK
        else:
            assert after[place].min() >= 255 - 0.19 * 255
    assert tile.kept_mask.sum() == 5


def test_patches_of_one_token_have_its_colour(tile):
    colours = cells(draw.draw_merged(tile), tile)
    plain = cells(draw.enlarge_tile(tile).convert("L"), tile)
    for place, group in np.ndenumerate(tile.groups.numpy()):
        if group >= 0:
            expected = 0.4 * plain[place][20, 20] + 0.6 * np.array(draw.colour_of(int(group)))
            assert np.abs(colours[place][20, 20] - expected).max() <= 1, place
    numbers = {int(group) for group in tile.groups.flatten()}
    assert numbers >= {0, 1, 2}


def test_kept_patches_and_targets_can_not_be_mixed_up(tile):
    """Kept ones have the outline that they have everywhere; a target is a disc, whose frame looked like it."""
    drawn = cells(draw.draw_merged(tile), tile)
    for place, group in np.ndenumerate(tile.groups.numpy()):
        corner, ring = (
            tuple(drawn[place][0, 0]),
            drawn[place][60, 60 - 40],
        )  # of 120 × 120 pixels; the disc's radius is 45
        is_target = place[0] * tile.grid[1] + place[1] in tile.target_patches
        assert (corner == draw.MARK) == (group == KEPT)
        assert (set(ring.tolist()) in ({0}, {255})) == is_target
    assert draw.MARK not in draw.GROUP_COLOURS


def test_the_most_attended_patch_is_the_brightest(tile):
    heat = cells(draw.draw_heat(tile), tile)
    brightest = max(
        heat, key=lambda place: heat[place][..., 1].mean() - heat[place][..., 2].mean()
    )  # yellow: little blue
    assert brightest == np.unravel_index(int(tile.attention.argmax()), tile.grid)


def test_a_panel_has_room_for_everything(tile):
    sheet = draw.draw_panel(
        [("a" * 300, draw.draw_kept(tile)), ("b", draw.draw_merged(tile))], "title", "one line\nanother", "dark"
    )
    width, height = draw.draw_kept(tile).size
    assert sheet.width >= 2 * width
    assert sheet.height > height + 60
    assert sheet.getpixel((1, 1)) == draw.THEMES["dark"].background


def test_cividis_is_the_published_one():
    """Against matplotlib's table, between the anchors too."""
    import matplotlib

    values = np.linspace(0, 1, 50)
    assert np.abs(draw.cividis(values) - 255 * matplotlib.colormaps["cividis"](values)[:, :3]).max() < 8


def test_cells_are_square_and_never_too_small_for_a_number():
    assert [draw.cell_size(grid) for grid in ((4, 4), (24, 24), (4, 60))] == [120, 20, 20]
