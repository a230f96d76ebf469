"""Drawings of what was kept, with Pillow alone: kept patches, merged groups, heat maps, and panels that put them side by side.

All colours are from palettes that can be distinguished with red-green colour blindness (Okabe and Ito; cividis), and no meaning is
conveyed by colour alone: kept patches have an outline, groups have numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visionzip.analysis.style import BLUE, GREEN, ORANGE, PINK, SKY, THEMES, VERMILION, rgb
from visionzip.analysis.trace import KEPT, Tile
from visionzip.compress import DROPPED

#: of merged groups; repeats after five. Black and yellow vanish on dark and light images, vermilion is what is kept.
GROUP_COLOURS = tuple(rgb(colour) for colour in (BLUE, ORANGE, GREEN, PINK, SKY))
MARK = rgb(VERMILION)  # outline of kept patches, in every drawing
_CIVIDIS = np.array(
    [(0, 34, 78), (0, 46, 106), (26, 56, 111), (50, 67, 109), (67, 78, 108), (83, 90, 109),
     (97, 101, 111), (111, 112, 115), (125, 124, 120), (140, 136, 120), (155, 148, 118), (171, 160, 114),
     (188, 174, 108), (205, 187, 99), (222, 201, 88), (240, 216, 70), (254, 232, 56)], dtype=np.float32)  # fmt: skip


@lru_cache
def load_font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans if matplotlib is installed (it has × and most alphabets), else Pillow's own font, which has little beyond Latin."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin:
        path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def cell_size(grid: tuple[int, int], side: int = 480) -> int:
    """Size of a drawn patch in pixels: about `side` for the whole image, but large enough for a number in each patch."""
    return max(20, round(side / max(grid)))


def enlarge_tile(tile: Tile, side: int = 480) -> Image.Image:
    """The encoder's input, at the size that all its drawings have."""
    cell = cell_size(tile.grid, side)
    return tile.image.convert("RGB").resize((tile.grid[1] * cell, tile.grid[0] * cell), Image.Resampling.BICUBIC)


def draw_kept(tile: Tile, side: int = 480, veil: float = 0.82) -> Image.Image:
    """The image with the kept patches outlined and the rest whitened."""
    image, cell = enlarge_tile(tile, side), cell_size(tile.grid, side)
    mask = np.kron(tile.kept_mask.numpy(), np.ones((cell, cell), dtype=bool))
    pixels = np.asarray(image).astype(np.float32)
    pixels[~mask] += (255 - pixels[~mask]) * veil
    image = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for row, column in tile.kept_mask.nonzero().tolist():
        pen.rectangle(_box(row, column, cell), outline=MARK, width=max(1, cell // 14))
    return image


def draw_merged(tile: Tile, side: int = 480, tint: float = 0.6) -> Image.Image:
    """Patches merged into one contextual token share a colour and a number; the target's number is on a disc. Kept patches are outlined as
    in `draw_kept`."""
    image, cell = enlarge_tile(tile, side), cell_size(tile.grid, side)
    pixels = np.asarray(image).astype(np.float32)
    grey = np.asarray(image.convert("L").convert("RGB")).astype(np.float32)  # grey: only groups have a colour
    groups = tile.groups.numpy()
    for row, column in np.ndindex(*tile.grid):
        group = int(groups[row, column])
        if group == KEPT:
            continue
        place = np.s_[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        colour = np.array((255, 255, 255) if group == DROPPED else colour_of(group), dtype=np.float32)
        share = 0.82 if group == DROPPED else tint
        pixels[place] = grey[place] * (1 - share) + colour * share
    image = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(image)
    digits = load_font(max(10, round(cell * 0.42)))
    for row, column in np.ndindex(*tile.grid):
        group = int(groups[row, column])
        if group >= 0:
            left, top, right, bottom = _box(row, column, cell)
            centre = ((left + right) / 2, (top + bottom) / 2)
            ink = text_on(_mixed(image, centre))
            if row * tile.grid[1] + column in tile.target_patches:
                radius = 0.38 * cell
                box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
                pen.ellipse(box, fill=ink)
                ink = text_on(ink)
            pen.text(centre, str(group + 1), fill=ink, font=digits, anchor="mm")
        elif group == KEPT:
            pen.rectangle(_box(row, column, cell), outline=MARK, width=max(1, cell // 14))
    return image


def draw_heat(tile: Tile, side: int = 480, opacity: float = 0.72) -> Image.Image:
    """Each patch's share of the attention, drawn over the greyscale image: dark blue is the least, yellow the most.

        The scale is a square root: a few patches receive most of the attention (the paper's point), and on a linear scale the others would
    all look the same.

        Raises:
            ValueError: if the trace has no attention scores.
    """
    if tile.attention is None:
        raise ValueError("this model gave no attention scores for the image, so there is no heat map to draw")
    return draw_overlay(tile, tile.attention.numpy(), side, opacity)


def draw_overlay(tile: Tile, values: np.ndarray, side: int = 480, opacity: float = 0.72) -> Image.Image:
    """Draw ``(rows, columns)`` non-negative values over the image, on a square-root scale from 0 to their maximum."""
    cell = cell_size(tile.grid, side)
    scaled = np.sqrt(np.clip(values, 0, None) / max(float(values.max()), 1e-12))
    colours = np.kron(cividis(scaled), np.ones((cell, cell, 1)))
    grey = np.asarray(enlarge_tile(tile, side).convert("L").convert("RGB")).astype(np.float32)
    return Image.fromarray((grey * (1 - opacity) + colours * opacity).round().astype(np.uint8))


def cividis(values: np.ndarray) -> np.ndarray:
    """Values ``(…)`` in [0, 1] → ``(…, 3)`` RGB of the cividis scale, in [0, 255]."""
    places = np.linspace(0, 1, len(_CIVIDIS))
    return np.stack([np.interp(values, places, _CIVIDIS[:, channel]) for channel in range(3)], axis=-1)


def colour_of(group: int) -> tuple[int, int, int]:
    return GROUP_COLOURS[group % len(GROUP_COLOURS)]


def text_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on `colour` (relative luminance as in WCAG 2)."""
    linear = [((value / 255 + 0.055) / 1.055) ** 2.4 if value > 10 else value / 3294.6 for value in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def draw_panel(
    images: Sequence[tuple[str, Image.Image]], title: str = "", note: str = "", theme: str = "light"
) -> Image.Image:
    """Images with their captions side by side, a title above and a note below."""
    look = THEMES[theme]
    big, small = load_font(19), load_font(14)
    gap, line = 16, 24
    top = gap + (34 if title else 0)
    notes = note.splitlines()
    width = gap + sum(image.width + gap for _, image in images)
    width = max(
        [width, *(round(small.getlength(text)) + 2 * gap for text in notes), round(big.getlength(title)) + 2 * gap]
    )
    height = top + line + max(image.height for _, image in images) + gap + line * len(notes)
    sheet = Image.new("RGB", (width, height), look.background)
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, gap), title, fill=look.text, font=big)
    left = gap
    for caption, image in images:
        pen.text((left, top), _fitted(caption, small, image.width), fill=look.text, font=small)
        sheet.paste(image, (left, top + line))
        left += image.width + gap
    for number, text in enumerate(notes):
        pen.text((gap, height - gap // 2 - line * (len(notes) - number)), text, fill=look.quiet, font=small)
    return sheet


def _fitted(text: str, used: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if used.getlength(text) <= width:
        return text
    while text and used.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _box(row: int, column: int, cell: int) -> tuple[int, int, int, int]:
    return column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1


def _mixed(image: Image.Image, place: tuple[float, float]) -> tuple[int, int, int]:
    red, green, blue = image.getpixel((int(place[0]), int(place[1])))  # type: ignore[misc]
    return int(red), int(green), int(blue)
