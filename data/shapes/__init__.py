"""The embedded data set: images of a few coloured shapes, and questions about them, made on the fly from a seed.

    python -m data.shapes --out runs/shapes --train 4000 --eval 400 --seed 0

writes `train.json`, `eval.json` (LLaVA's own form) and `images/` once; a second call with the same numbers does nothing. `--locate` adds
`locate-train.json` and `locate-eval.json`, questions about the same images that only positions answer (`data.locate`).
Each record is one conversation about one image, with one round of each type in `TYPES`, in an order of its own, so that every
type also comes first: evaluation asks single questions. The extra key `types` names the type of each round.

An image is a function of one integer. Those of the training images are even and those of the held-out ones odd, whatever
`--seed` and the counts are, so that no held-out image can ever have been trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from data.folder import write_once
from data.locate import VERSION, Located, locate
from data.rounds import Round, render_record
from data.scenes import COLOURS, PAIRS, SHAPES, SIZE, Scene, Shape, draw_scene, encode_jpeg, make_scene, once

__all__ = [
    "COLOURS",
    "PAIRS",
    "PLACES",
    "SHAPES",
    "SIZE",
    "SPLITS",
    "TYPES",
    "Round",
    "Scene",
    "Shape",
    "conversation",
    "draw_scene",
    "encode_jpeg",
    "image_seed",
    "locate_record",
    "make_scene",
    "record",
    "records",
    "write",
]  # fmt: skip

PLACES = (
    "top left", "top", "top right",
    "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
TYPES = ("exists", "count", "colour", "shape", "where")
SPLITS = ("train", "eval")

_MANIFEST = "shapes.json"
_VERSION = 1  # raise it when images or questions change, so that folders written before are made again


def image_seed(split: str, seed: int, index: int) -> int:
    """The integer that makes the `index`-th image of a split: even for "train", odd for "eval", so never the same."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    if seed < 0 or not 0 <= index < 2**32:
        raise ValueError(f"seed {seed}, index {index}: expected a seed of at least 0 and an index from 0 to 2**32 - 1")
    return 2 * (seed * 2**32 + index) + SPLITS.index(split)


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _exists(made: Scene, rng: random.Random) -> Round:
    present = [(s.colour, s.name) for s in made.shapes]
    if rng.random() < 0.5:
        colour, name = rng.choice(present)
    else:  # something absent; mostly a near miss, so that neither colour nor shape alone tells
        absent = [pair for pair in PAIRS if pair not in present]
        near = [(c, n) for c, n in absent if any(c == p[0] for p in present) and any(n == p[1] for p in present)]
        colour, name = rng.choice(near if near and rng.random() < 0.5 else absent)
    thing = f"{colour} {name}"
    question = rng.choice(
        (f"Is there {_a(thing)} in the picture?", f"Is there {_a(thing)}?", f"Can you see {_a(thing)}?")
    )
    return Round("exists", question, "Yes" if (colour, name) in present else "No")


def _count(made: Scene, rng: random.Random) -> Round:
    kind = rng.randrange(3)
    mostly_there = rng.random() < 0.7  # else the answer would nearly always be 0
    if kind == 0:
        number, things = len(made.shapes), "shapes"
    elif kind == 1:
        colour = rng.choice([s.colour for s in made.shapes] if mostly_there else list(COLOURS))
        number, things = sum(s.colour == colour for s in made.shapes), f"{colour} shapes"
    else:
        name = rng.choice([s.name for s in made.shapes] if mostly_there else list(SHAPES))
        number, things = sum(s.name == name for s in made.shapes), _plural(name)
    question = rng.choice((f"How many {things} are there?", f"How many {things} can you see?"))
    return Round("count", question, str(number))


def _colour(made: Scene, rng: random.Random) -> Round:
    name = rng.choice(once([s.name for s in made.shapes]))
    answer = next(s.colour for s in made.shapes if s.name == name)
    return Round("colour", rng.choice((f"What colour is the {name}?", f"Which colour does the {name} have?")), answer)


def _form(made: Scene, rng: random.Random) -> Round:
    colour = rng.choice(once([s.colour for s in made.shapes]))
    answer = next(s.name for s in made.shapes if s.colour == colour)
    return Round("shape", rng.choice((f"What shape is the {colour} thing?", f"Which shape is {colour}?")), answer)


def _where(made: Scene, rng: random.Random) -> Round:
    thing = rng.choice(once([f"{s.colour} {s.name}" for s in made.shapes]))
    answer = next(PLACES[s.place] for s in made.shapes if f"{s.colour} {s.name}" == thing)
    return Round(
        "where", rng.choice((f"Where is the {thing}?", f"In which part of the picture is the {thing}?")), answer
    )


_ASK: dict[str, Callable[[Scene, random.Random], Round]] = {
    "exists": _exists,
    "count": _count,
    "colour": _colour,
    "shape": _form,
    "where": _where,
}


def conversation(made: Scene, variant: int = 0, types: Sequence[str] = TYPES) -> list[Round]:
    """A round of each of `types` about a scene, shuffled. Another `variant` asks other things in another order."""
    rng = random.Random(f"questions {made.seed} {variant}")
    rounds = [_ASK[name](made, rng) for name in types]
    rng.shuffle(rounds)
    return rounds


# ---------------------------------------------------------------- records and files


def record(split: str, seed: int, index: int) -> dict:
    """The `index`-th record of a split in LLaVA's form; `image` is relative to the `images` folder."""
    rounds = conversation(make_scene(image_seed(split, seed, index)))
    return render_record(f"shapes-{split}-{seed}-{index}", f"{split}/{index:06d}.jpg", rounds)


def records(split: str, count: int, seed: int = 0) -> Iterator[tuple[dict, Image.Image]]:
    """`count` records and their images, without a disk. Held-out records: `records("eval", ...)`."""
    for index in range(count):
        yield record(split, seed, index), draw_scene(make_scene(image_seed(split, seed, index)))


def locate_record(split: str, seed: int, index: int) -> dict:
    """A record of `data.locate`'s questions about the image of the `index`-th record. Shapes that have a twin are not asked about."""
    made = make_scene(image_seed(split, seed, index))
    names = [f"{shape.colour} {shape.name}" for shape in made.shapes]
    things = [
        Located(name, shape.x / SIZE, shape.y / SIZE)
        for name, shape in zip(names, made.shapes, strict=True)
        if names.count(name) == 1
    ]
    rounds = locate(things, random.Random(f"locate {made.seed}"))
    return render_record(f"shapes-locate-{split}-{seed}-{index}", f"{split}/{index:06d}.jpg", rounds)


def write(out: str | Path, train: int = 4000, held_out: int = 400, seed: int = 0, located: bool = False) -> bool:
    """Write the data set into the folder `out`; True if it was written, False if it was there already.

    Args:
        located: write `locate-train.json` and `locate-eval.json` as well.

    Raises:
        ValueError: `out` holds something else, which is left alone; see `data.folder.write_once`.
    """
    wanted = {"version": _VERSION, "train": train, "eval": held_out, "seed": seed}
    if located:
        wanted["locate"] = VERSION

    def fill(folder: Path) -> None:
        for split, count in (("train", train), ("eval", held_out)):
            _write_split(folder, split, count, seed)
            if located:
                _write_records(
                    folder / f"locate-{split}.json", [locate_record(split, seed, index) for index in range(count)]
                )

    return write_once(out, _MANIFEST, wanted, fill)


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    (folder / "images" / split).mkdir(parents=True)
    made = []
    for entry, image in records(split, count, seed):
        (folder / "images" / entry["image"]).write_bytes(encode_jpeg(image))
        made.append(entry)
    _write_records(folder / f"{split}.json", made)


def _write_records(path: Path, made: list[dict]) -> None:
    path.write_text(json.dumps(made, indent=0) + "\n", encoding="utf-8")
