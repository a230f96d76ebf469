"""What is shown in the scenes of `data.stamps`, and the scenes: one to four cut-out photographs before a texture or a photograph.

The stamps are those of Tux Paint (https://tuxpaint.org/stamps/, GPL-2): `CATALOGUE` names the ones that are used, most of them
photographs with transparent surroundings. Everything in a scene is a function of its seed and of the files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")  # reading order: 2 * row + column
#: Side of a stamp's longer edge, and how far its centre stays from the middle lines, as shares of the image's side.
SMALLEST, LARGEST, MARGIN = 0.30, 0.46, 0.06

_SEEN = """
animal
  frog: animals/amphibians/frog
  crow: animals/birds/crow
  duck: animals/birds/duck
  hen: animals/birds/hen
  owl: animals/birds/owl
  penguin: animals/birds/penguin animals/birds/magellanic_penguin
  flamingo: animals/birds/pink_flamingo
  seagull: animals/birds/seagull animals/birds/silver-gull
  toucan: animals/birds/tucan
  turkey: animals/birds/turkey
  butterflyfish: animals/fish/butterflyfish
  lobster: animals/fish/lobster
  seahorse: animals/fish/seahorse
  grasshopper: animals/insects/grasshopper
  gorilla: animals/mammals/apes/gorilla
  dolphin: animals/mammals/aquatic/dolphin
  orca: animals/mammals/aquatic/orca
  bear: animals/mammals/bears/bear animals/mammals/bears/european-bear
  cow: animals/mammals/bovines/cow animals/mammals/bovines/cow_white
  goat: animals/mammals/bovines/goat
  sheep: animals/mammals/bovines/sheep
  camel: animals/mammals/camel/camel animals/mammals/camel/dromedary
  lion: animals/mammals/cats/lion animals/mammals/cats/lion-2
  tiger: animals/mammals/cats/tiger animals/mammals/cats/tiger_sumatran
  dog: animals/mammals/dogs/dog
  elephant: animals/mammals/elephant
  horse: animals/mammals/equines/horse
  zebra: animals/mammals/equines/zebra
  giraffe: animals/mammals/giraffe
  pig: animals/mammals/pig animals/mammals/pig_golden
  rabbit: animals/mammals/rodents/rabbit animals/mammals/rodents/rabbit-2
  squirrel: animals/mammals/rodents/squirrel
  kangaroo: animals/marsupials/kangaroo
food
  strawberry: food/fruit/Strawberry2
  apple: food/fruit/apple_fuji food/fruit/apple_granny_smith food/fruit/apple_sierra_beauty
  banana: food/fruit/banana
  lemon: food/fruit/lemon
  orange: food/fruit/orange food/fruit/mandarine
  pear: food/fruit/pear
  pineapple: food/fruit/pineapple
  raspberry: food/fruit/raspberry
  kiwi: food/fruit/kiwi
  carrot: food/vegetables/carrot
  onion: food/vegetables/onion
  pepper: food/vegetables/pepper food/vegetables/yellowpepper
  tomato: food/vegetables/tomato
  eggplant: food/vegetables/eggplant
plant
  daffodil: plants/flowers/daffodil
  iris: plants/flowers/iris
  rose: plants/flowers/rose
  marigold: plants/flowers/marigold
  mushroom: plants/mushrooms/cep plants/mushrooms/cep-1
  palm tree: plants/trees/liberia-palm
vehicle
  car: vehicles/auto/beetle vehicles/auto/sedan vehicles/auto/sportscar2
  truck: vehicles/auto/truck
  fire truck: vehicles/emergency/firetruck
  bus: vehicles/masstransit/green_korean_bus
  airplane: vehicles/flight/planes/747
  balloon: vehicles/flight/balloon360
  sailboat: vehicles/ship/walnutBoat
  tricycle: vehicles/cycle/pink_tricycle
tool
  hammer: household/tools/hammer
  saw: household/tools/saw
  shovel: household/tools/spade
  wrench: household/tools/wrench household/tools/wrench_adjustable
  paintbrush: household/tools/paintbrush_large
instrument
  trumpet: hobbies/music/brass/trumpet
  drum kit: hobbies/music/percussion/drumkit
  guitar: hobbies/music/string/guitar2 hobbies/music/string/guitar_classical hobbies/music/string/guitar_electric
  violin: hobbies/music/string/violin
ball
  basketball: sports/basketball
  soccer ball: sports/soccer
  tennis ball: sports/tennis_ball
  football: sports/football
"""
_UNSEEN = """
animal
  ostrich: animals/birds/ostrich
  pelican: animals/birds/pelican
  rooster: animals/birds/rooster
  vulture: animals/birds/vulture
  clownfish: animals/fish/clownfish
  iguana: animals/lizards/iguana
  chimpanzee: animals/mammals/apes/chimp
  sea lion: animals/mammals/aquatic/sea_lion
  badger: animals/mammals/badger
  deer: animals/mammals/deer/deer
  fox: animals/mammals/dogs/fox
  hippopotamus: animals/mammals/hippopotamus
  rhino: animals/mammals/rhino_black
  koala: animals/marsupials/koala
food
  apricot: food/fruit/Apricot_whole
  avocado: food/fruit/avocado
  mango: food/fruit/mango
  potato: food/vegetables/potato
plant
  petunia: plants/flowers/whitestar-petunia
  flower: plants/flowers/flower1
  oak: plants/trees/holm_oak
vehicle
  garbage truck: vehicles/garbagetruck
  race car: vehicles/race/indycar
tool
  mallet: household/tools/mallet_metal
  toolbox: household/tools/toolbox
instrument
  cello: hobbies/music/string/cello
  bassoon: hobbies/music/wind/bassoon
ball
  cricket ball: sports/cricketball
"""


@dataclass(frozen=True)
class Thing:
    """Something that has stamps: its `name` and `kind` in questions and answers, its `stamps` relative to the folder of stamps."""

    name: str
    kind: str
    stamps: tuple[str, ...]
    seen: bool


@dataclass(frozen=True)
class Placed:
    """A thing in a scene: which of its stamps, and its place. Lengths are shares of the image's side."""

    thing: Thing
    stamp: str
    quadrant: int
    x: float
    y: float
    size: float
    mirrored: bool
    angle: float

    @property
    def place(self) -> str:
        return QUADRANTS[self.quadrant]


@dataclass(frozen=True)
class StampScene:
    """One to four things of different names, each in a quadrant of its own, in reading order."""

    seed: str
    things: tuple[Placed, ...]

    def at(self, quadrant: int) -> Placed | None:
        return next((placed for placed in self.things if placed.quadrant == quadrant), None)


def _parse(text: str, seen: bool) -> list[Thing]:
    found, kind = [], ""
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            kind = line
            continue
        name, _, stamps = line.strip().partition(": ")
        found.append(Thing(name, kind, tuple(f"{stamp}.png" for stamp in stamps.split()), seen))
    return found


CATALOGUE: tuple[Thing, ...] = (*_parse(_SEEN, seen=True), *_parse(_UNSEEN, seen=False))
KINDS: tuple[str, ...] = tuple(dict.fromkeys(thing.kind for thing in CATALOGUE))


def compose(seed: str, things: Sequence[Thing]) -> StampScene:
    """The scene of this seed, out of `things`. A kind is drawn before a thing: most are animals, and would fill the scenes."""
    rng = random.Random(f"stamps {seed}")
    count = rng.choices((1, 2, 3, 4), weights=(1, 3, 3, 2))[0]
    kinds = list(dict.fromkeys(thing.kind for thing in things))
    chosen: list[Thing] = []
    while len(chosen) < count:
        kind = "animal" if rng.random() < 0.35 else rng.choice(kinds)
        thing = rng.choice([thing for thing in things if thing.kind == kind])
        if thing not in chosen:
            chosen.append(thing)
    quadrants = sorted(rng.sample(range(4), count))
    return StampScene(seed, tuple(_place(rng, thing, place) for thing, place in zip(chosen, quadrants, strict=True)))


def _place(rng: random.Random, thing: Thing, quadrant: int) -> Placed:
    row, column = divmod(quadrant, 2)
    size = rng.uniform(SMALLEST, LARGEST)
    near, far = MARGIN + size / 4, 0.5 - size / 2.2  # of the centre, from the middle line and towards the edge
    x, y = (0.5 + (1 if side else -1) * rng.uniform(near, max(near, far)) for side in (column, row))
    return Placed(thing, rng.choice(thing.stamps), quadrant, x, y, size, rng.random() < 0.5, rng.uniform(-10, 10))


def paint(scene: StampScene, stamps: Path, backgrounds: Sequence[Path], side: int) -> Image.Image:
    """The scene as an RGB image of `side` × `side` pixels: before one of `backgrounds`, or before a texture for every other scene.

    Raises:
        OSError: for a stamp or background that is missing or can't be read.
    """
    rng = random.Random(f"paint {scene.seed}")
    if backgrounds and rng.random() < 0.5:
        image = _photograph(rng, rng.choice(backgrounds), side)
    else:
        image = _texture(np.random.default_rng(rng.getrandbits(63)), side)
    for placed in scene.things:
        stamp = _stamp(str(stamps / placed.stamp))
        if placed.mirrored:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = placed.size * side / max(stamp.size)
        stamp = stamp.resize([max(1, round(length * scale)) for length in stamp.size], Image.Resampling.LANCZOS)
        stamp = stamp.rotate(placed.angle, Image.Resampling.BICUBIC, expand=True)
        corner = (round(placed.x * side - stamp.width / 2), round(placed.y * side - stamp.height / 2))
        image.paste(stamp, corner, stamp)
    return image


@lru_cache(maxsize=256)
def _stamp(path: str) -> Image.Image:
    """Cropped to what is not transparent, and no larger than a scene needs."""
    stamp = Image.open(path).convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    stamp.thumbnail((400, 400), Image.Resampling.LANCZOS)
    return stamp


@lru_cache(maxsize=32)
def _background(path: str) -> Image.Image:
    image = Image.open(path).convert("RGB")
    image.thumbnail((900, 900), Image.Resampling.LANCZOS)
    return image


def _photograph(rng: random.Random, path: Path, side: int) -> Image.Image:
    """A random square of a photograph, perhaps mirrored, out of focus and of another brightness."""
    image = _background(str(path))
    length = rng.uniform(0.4, 1.0) * min(image.size)
    left, top = (rng.uniform(0, edge - length) for edge in image.size)
    image = image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + length, top + length))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, side / 90)))
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.2))


def _texture(rng: np.random.Generator, side: int) -> Image.Image:
    """A tint, blotches of two sizes over it, and grain."""
    image = np.full((side, side, 3), rng.uniform(60, 200) + rng.uniform(-40, 40, 3), dtype=np.float32)
    for cells, strength in ((5, 22.0), (24, rng.uniform(0, 14))):
        blotches = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
        image += np.asarray(blotches.resize((side, side), Image.Resampling.BICUBIC))[:, :, None]
    image += rng.normal(0, rng.uniform(2, 10), image.shape)
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
