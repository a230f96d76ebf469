"""What the images of the embedded data set show, and how it is drawn: a few coloured shapes before a greyish background.

Everything is a function of one integer, the image's seed. Questions about a scene are in `data/shapes/`.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 72  # pixels, width and height
GRID = 3  # shapes stand in a jittered 3 x 3 grid, so that "where" always has one right answer
COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 165, 65),
    "blue": (45, 75, 215),
    "yellow": (240, 220, 45),
    "purple": (145, 50, 185),
    "orange": (245, 135, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

_OVERSAMPLE = 3  # shapes are drawn this much larger and shrunk, for smooth edges


@dataclass(frozen=True)
class Shape:
    """One shape: centre and radius in pixels, angle in radians, `place` its cell of the grid in reading order."""

    colour: str
    name: str
    place: int
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """What is in the image of this seed."""

    seed: int
    shapes: tuple[Shape, ...]

    def pairs(self) -> list[int]:
        """Indices into `PAIRS` of the colour-shape pairs that are present, sorted, each once."""
        return sorted({PAIRS.index((s.colour, s.name)) for s in self.shapes})


def make_scene(seed: int) -> Scene:
    """What the image of this seed shows: 1 to 5 shapes; at least one has a colour and one a form that no other has.

    Without those, "what colour is the circle?" and "which shape is red?" could not be asked about every image.
    """
    rng = random.Random(f"scene {seed}")
    while True:
        count = rng.choices((1, 2, 3, 4, 5), weights=(1, 2, 3, 3, 3))[0]
        shapes = tuple(_shape(rng, place) for place in rng.sample(range(GRID * GRID), count))
        made = Scene(seed, shapes)
        if once([s.colour for s in shapes]) and once([s.name for s in shapes]):
            return made


def once(values: list[str]) -> list[str]:
    """Those that are there exactly once, in order."""
    return [value for value in values if values.count(value) == 1]


def _shape(rng: random.Random, place: int) -> Shape:
    cell = SIZE / GRID
    row, column = divmod(place, GRID)
    colour = rng.choice(tuple(COLOURS))
    rgb = tuple(max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLOURS[colour])
    return Shape(
        colour=colour,
        name=rng.choice(SHAPES),
        place=place,
        x=(column + 0.5) * cell + rng.uniform(-2.5, 2.5),
        y=(row + 0.5) * cell + rng.uniform(-2.5, 2.5),
        radius=rng.uniform(7.5, 10.5),
        angle=rng.uniform(-0.25, 0.25),
        rgb=(rgb[0], rgb[1], rgb[2]),
    )


def draw_scene(made: Scene) -> Image.Image:
    """The scene as an RGB image of `SIZE` x `SIZE` pixels."""
    background = Image.fromarray(_background(np.random.default_rng(made.seed)))
    large = SIZE * _OVERSAMPLE
    for shape in made.shapes:
        mask = Image.new("L", (large, large), 0)
        ImageDraw.Draw(mask).polygon([(x * _OVERSAMPLE, y * _OVERSAMPLE) for x, y in _outline(shape)], fill=255)
        background.paste(shape.rgb, (0, 0), mask.resize((SIZE, SIZE), Image.Resampling.BOX))
    return background


def _background(rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: a greyish tint, slow blotches over it, and grain. Never as coloured as a shape is."""
    tint = rng.uniform(70, 185) + rng.uniform(-14, 14, 3)
    blotches = Image.fromarray(rng.normal(0, 22, (5, 5)).astype(np.float32)).resize(
        (SIZE, SIZE), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, rng.uniform(3, 12), (SIZE, SIZE, 3))
    return np.clip(tint + np.asarray(blotches)[:, :, None] + grain, 0, 255).astype(np.uint8)


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """Corners in pixels, scaled so that all shapes of one radius look about as large as each other."""
    if shape.name == "circle":
        polar = [(2 * math.pi * i / 32, 0.95) for i in range(32)]
    elif shape.name == "square":
        polar = [(math.pi / 4 + math.pi / 2 * i, 1.15) for i in range(4)]
    elif shape.name == "triangle":
        polar = [(-math.pi / 2 + 2 * math.pi / 3 * i, 1.2) for i in range(3)]
    elif shape.name == "star":
        polar = [(-math.pi / 2 + math.pi / 5 * i, 1.25 if i % 2 == 0 else 0.5) for i in range(10)]
    else:
        arm, width = 1.1, 0.36
        corner, angle = math.hypot(arm, width), math.atan2(width, arm)
        polar = []
        for quarter in range(4):
            turn = math.pi / 2 * quarter
            polar += [(turn - angle, corner), (turn + angle, corner), (turn + math.pi / 4, width * math.sqrt(2))]
    return [
        (shape.x + shape.radius * r * math.cos(a + shape.angle), shape.y + shape.radius * r * math.sin(a + shape.angle))
        for a, r in polar
    ]


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG without chroma subsampling: with it, the colour of a shape two patches wide runs into the background."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()
