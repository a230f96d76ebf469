"""Questions that only positions answer: what `--locate` adds to the generated data sets.

They are asked apart from a data set's own questions, in files of their own about the same images, so that its records stay what
they are. Every question has one right answer that is not a matter of a few pixels: what is closer than `CLEAR` is not asked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.rounds import Round

TYPES = ("quadrant", "cell", "side", "distance")
VERSION = 1  # raise it when questions change, so that folders written before are made again

#: How far a thing is from the line that decides, or two things from equal, as a share of the image's side.
CLEAR = 0.08

CORNERS = {"top left": (0.0, 0.0), "top right": (1.0, 0.0), "bottom left": (0.0, 1.0), "bottom right": (1.0, 1.0)}
SIDES = ("further left", "further right", "higher up", "further down")


@dataclass(frozen=True)
class Located:
    """A thing that questions can name, and its centre: shares of the image's width and height, from the top left."""

    name: str
    x: float
    y: float


def locate(things: Sequence[Located], rng: random.Random) -> list[Round]:
    """A round of each of `TYPES` that the scene has a clear answer to, shuffled. Names must be unique. May be empty."""
    rounds = [made for name in TYPES if (made := _ASK[name](things, rng)) is not None]
    rng.shuffle(rounds)
    return rounds


def _quadrant(things: Sequence[Located], rng: random.Random) -> Round | None:
    clear = [thing for thing in things if min(abs(thing.x - 0.5), abs(thing.y - 0.5)) >= CLEAR]
    if not clear:
        return None
    thing = rng.choice(clear)
    question = rng.choice(("In which quarter of the picture is the {}?", "Which quarter of the picture shows the {}?"))
    answer = f"{'bottom' if thing.y > 0.5 else 'top'} {'right' if thing.x > 0.5 else 'left'}"
    return Round("quadrant", question.format(thing.name), answer)


def _cell(things: Sequence[Located], rng: random.Random) -> Round | None:
    """Of a grid of three by three."""
    lines = (1 / 3, 2 / 3)
    clear = [thing for thing in things if min(abs(at - line) for at in (thing.x, thing.y) for line in lines) >= CLEAR]
    if not clear:
        return None
    thing = rng.choice(clear)
    question = rng.choice(("In which row and column of three is the {}?", "Which row and column of three has the {}?"))
    return Round("cell", question.format(thing.name), f"row {int(thing.y * 3) + 1}, column {int(thing.x * 3) + 1}")


def _side(things: Sequence[Located], rng: random.Random) -> Round | None:
    """Which of two things is further to one side."""
    side = rng.choice(SIDES)
    keys: dict[str, Callable[[Located], float]] = {
        "further left": lambda thing: -thing.x,
        "further right": lambda thing: thing.x,
        "higher up": lambda thing: -thing.y,
        "further down": lambda thing: thing.y,
    }
    return _of_two("side", f"Which is {side}", things, keys[side], rng)


def _distance(things: Sequence[Located], rng: random.Random) -> Round | None:
    """Which of two things is nearer to a corner, or farther from it."""
    corner = rng.choice(tuple(CORNERS))
    far = rng.random() < 0.5

    def key(thing: Located) -> float:
        away = math.dist((thing.x, thing.y), CORNERS[corner])
        return away if far else -away

    asked = f"Which is {'farther from' if far else 'nearer to'} the {corner} corner"
    return _of_two("distance", asked, things, key, rng)


def _of_two(
    kind: str, asked: str, things: Sequence[Located], key: Callable[[Located], float], rng: random.Random
) -> Round | None:
    """A question about two things, which is the one of greater `key`; None where no two are `CLEAR` apart."""
    pairs = [(a, b) for a in things for b in things if key(a) - key(b) >= CLEAR]
    if not pairs:
        return None
    pair = rng.choice(pairs)
    first, second = rng.sample(pair, 2)
    return Round(kind, f"{asked}, the {first.name} or the {second.name}?", pair[0].name)


_ASK: dict[str, Callable[[Sequence[Located], random.Random], Round | None]] = {
    "quadrant": _quadrant,
    "cell": _cell,
    "side": _side,
    "distance": _distance,
}
