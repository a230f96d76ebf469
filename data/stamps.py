"""A data set of real photographs: scenes of one to four cut-out stamps, and questions about them in plain English.

Each record is one conversation about one scene, in LLaVA's form, with one round of each type that the scene allows (fewer in
``train``), in an order of its own; the extra key `types` names the type of each round. Three splits, whose scenes never coincide:

- ``train``: things that are `Thing.seen`; several conversations about each scene, of a few rounds, some with a description;
- ``eval``: the same things in other scenes;
- ``unseen``: things that never occur in ``train``, and only questions that can be answered without knowing their names.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from data.folder import write_once
from data.locate import VERSION, Located, locate
from data.rounds import Round, render_record
from data.scenes import encode_jpeg
from data.stamp_scenes import CATALOGUE, KINDS, QUADRANTS, Placed, StampScene, Thing, compose, paint

TYPES = ("what", "where", "count", "exists", "kind", "beside", "order")
UNSEEN_TYPES = ("where", "count", "exists", "kind")  # answered by place, number or kind
SPLITS = ("train", "eval", "unseen")
LOCATED = ("train", "eval")  # splits that `--locate` asks about; it names things
SIDE = 224

#: Rounds of a conversation in ``train``. The more there are, the more is answered by an earlier answer rather than by the image.
ROUNDS = 5

_MANIFEST = "stamps.json"
_VERSION = 3  # raise it when scenes or questions change, so that folders written before are made anew


@dataclass(frozen=True)
class Size:
    """How many scenes each split has, and their side in pixels."""

    train: int = 6000
    eval: int = 150
    unseen: int = 75
    side: int = SIDE
    conversations: int = 3  # about each scene of ``train``


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(kind: str) -> str:
    return {"food": "pieces of food"}.get(kind, f"{kind}s")


def _one_of_kind(kind: str) -> str:
    return {"food": "some food"}.get(kind, _article(kind))


def _alone_of_kind(scene: StampScene) -> list[Placed]:
    kinds = [placed.thing.kind for placed in scene.things]
    return [placed for placed in scene.things if kinds.count(placed.thing.kind) == 1]


def _what(scene: StampScene, rng: random.Random, named: bool) -> Round | None:
    quadrant = rng.randrange(4) if rng.random() < 0.1 else rng.choice(scene.things).quadrant
    placed = scene.at(quadrant)
    question = rng.choice(("What is at the {}?", "What is in the {} corner?", "Which thing is at the {}?"))
    return Round("what", question.format(QUADRANTS[quadrant]), placed.thing.name if placed else "nothing")


def _where(scene: StampScene, rng: random.Random, named: bool) -> Round | None:
    by_kind = _alone_of_kind(scene)
    if not named and not by_kind:
        return None
    if not named or (by_kind and rng.random() < 0.3):
        placed = rng.choice(by_kind)
        thing = placed.thing.kind
    else:
        placed = rng.choice(scene.things)
        thing = placed.thing.name
    question = rng.choice(("Where is the {}?", "In which corner is the {}?", "Where can you see the {}?"))
    return Round("where", question.format(thing), placed.place)


def _count(scene: StampScene, rng: random.Random, named: bool) -> Round | None:
    if rng.random() < 0.5:
        number, things = len(scene.things), "things"
    else:
        there = [placed.thing.kind for placed in scene.things]
        kind = rng.choice(there if rng.random() < 0.7 else KINDS)  # else the answer would nearly always be 0
        number, things = there.count(kind), _plural(kind)
    question = rng.choice(("How many {} are there?", "How many {} can you see?", "How many {} are in the picture?"))
    return Round("count", question.format(things), str(number))


def _exists(scene: StampScene, rng: random.Random, named: bool) -> Round | None:
    there = {placed.thing.name: placed.thing.kind for placed in scene.things}
    yes = rng.random() < 0.5
    if not named or rng.random() < 0.3:
        absent = [kind for kind in KINDS if kind not in there.values()]
        thing = _one_of_kind(rng.choice(list(there.values()) if yes else absent))
    elif yes:
        thing = _article(rng.choice(list(there)))
    else:  # half of the time something like what is there, so that the kind alone does not tell
        others = [other for other in CATALOGUE if other.seen and other.name not in there]
        alike = [other for other in others if other.kind in there.values()]
        thing = _article(rng.choice(alike if rng.random() < 0.5 else others).name)
    question = rng.choice(("Is there {} in the picture?", "Is there {}?", "Can you see {}?"))
    return Round("exists", question.format(thing), "yes" if yes else "no")


def _kind(scene: StampScene, rng: random.Random, named: bool) -> Round | None:
    placed = rng.choice(scene.things)
    question = rng.choice(("What kind of thing is at the {}?", "What kind of thing is in the {} corner?"))
    return Round("kind", question.format(placed.place), placed.thing.kind)


def _beside(scene: StampScene, rng: random.Random, named: bool) -> Round | None:
    """A thing and its neighbour in the same row or column."""
    pairs = []
    for placed in scene.things:
        row, column = divmod(placed.quadrant, 2)
        across, along = scene.at(2 * row + 1 - column), scene.at(2 * (1 - row) + column)
        if across:
            pairs.append((placed, across, "to the left of" if column else "to the right of"))
        if along:
            pairs.append((placed, along, "above" if row else "below"))
    if not pairs:
        return None
    placed, neighbour, side = rng.choice(pairs)
    question = rng.choice(("What is {} the {}?", "Which thing is {} the {}?"))
    return Round("beside", question.format(side, placed.thing.name), neighbour.thing.name)


def _order(scene: StampScene, rng: random.Random, named: bool) -> Round | None:
    """Which of two is further to one side; they stand in different columns, or rows."""
    pairs = [(a, b) for a in scene.things for b in scene.things if a.quadrant < b.quadrant]
    options = [(a, b, "further left", "further right") for a, b in pairs if a.quadrant % 2 < b.quadrant % 2]
    options += [(b, a, "further left", "further right") for a, b in pairs if a.quadrant % 2 > b.quadrant % 2]
    options += [(a, b, "higher up", "lower down") for a, b in pairs if a.quadrant // 2 < b.quadrant // 2]
    if not options:
        return None
    first, last, before, behind = rng.choice(options)
    side, answer = rng.choice(((before, first), (behind, last)))
    names = [first.thing.name, last.thing.name]
    rng.shuffle(names)
    return Round("order", f"Which is {side}, the {names[0]} or the {names[1]}?", answer.thing.name)


def _caption(scene: StampScene, rng: random.Random) -> Round:
    told = [f"{_article(placed.thing.name)} at the {placed.place}" for placed in scene.things]
    text = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    question = rng.choice(("Describe the picture.", "What does the picture show?", "What can you see in the picture?"))
    return Round("caption", question, text)


_ASK: dict[str, Callable[[StampScene, random.Random, bool], Round | None]] = {
    "what": _what,
    "where": _where,
    "count": _count,
    "exists": _exists,
    "kind": _kind,
    "beside": _beside,
    "order": _order,
}


def conversation(scene: StampScene, split: str, variant: int = 0) -> list[Round]:
    """The rounds about a scene, shuffled. In ``train`` another `variant` asks other things, at most `ROUNDS` of them."""
    rng = random.Random(f"questions {scene.seed} {variant}" if variant else f"questions {scene.seed}")
    types = list(UNSEEN_TYPES if split == "unseen" else TYPES)
    if split == "train":
        types += ["what", "where", "count", "caption"]
        rng.shuffle(types)
    asked = [made for name in types if (made := _ask(name, scene, rng, split != "unseen")) is not None]
    rounds = list({made.question: made for made in asked}.values())  # a question twice teaches to copy the answer
    rounds = rounds[:ROUNDS] if split == "train" else rounds
    rng.shuffle(rounds)
    return sorted(rounds, key=lambda made: made.type == "caption")  # it answers whatever would come after it


def _ask(name: str, scene: StampScene, rng: random.Random, named: bool) -> Round | None:
    return _caption(scene, rng) if name == "caption" else _ASK[name](scene, rng, named)


def things_of(split: str) -> list[Thing]:
    """What scenes of a split are made of.

    Raises:
        ValueError: for a split that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return [thing for thing in CATALOGUE if thing.seen == (split != "unseen")]


def scene_of(split: str, seed: int, index: int) -> StampScene:
    """The `index`-th scene of a split."""
    return compose(f"{split} {seed} {index}", things_of(split))


def record(split: str, seed: int, index: int, variant: int = 0) -> dict:
    """A record about the `index`-th scene of a split in LLaVA's form; `image` is relative to the `images` folder."""
    rounds = conversation(scene_of(split, seed, index), split, variant)
    return render_record(f"stamps-{split}-{seed}-{index}-{variant}", f"{split}/{index:06d}.jpg", rounds)


def locate_record(split: str, seed: int, index: int) -> dict:
    """A record of `data.locate`'s questions about the `index`-th scene of ``train`` or ``eval``; things of ``unseen`` are never named."""
    scene = scene_of(split, seed, index)
    things = [Located(placed.thing.name, placed.x, placed.y) for placed in scene.things]
    rounds = locate(things, random.Random(f"locate {scene.seed}"))
    return render_record(f"stamps-locate-{split}-{seed}-{index}", f"{split}/{index:06d}.jpg", rounds)


def write(
    out: str | Path,
    stamps: Path,
    backgrounds: Sequence[Path],
    size: Size | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int], object] = lambda scenes: None,
    located: bool = False,
) -> bool:
    """Write ``train.json``, ``eval.json``, ``unseen.json`` and ``images/`` into `out`; False if they were there already.

    Args:
        stamps: a folder of stamps that `data.stamp_files.check_stamps` accepts.
        backgrounds: photographs; with none, every scene stands before a texture.
        progress: called with the number of scenes written so far.
        located: write ``locate-train.json`` and ``locate-eval.json`` as well.

    Raises:
        ValueError: `out` holds something else, which is left alone.
        OSError: a stamp or background can't be read, or `out` can't be written.
    """
    size = size or Size()
    counts = {"train": size.train, "eval": size.eval, "unseen": size.unseen}
    photographs = [path.name for path in backgrounds]
    wanted = {
        "version": _VERSION,
        **counts,
        "conversations": size.conversations,
        "side": size.side,
        "seed": seed,
        "backgrounds": photographs,
        **({"locate": VERSION} if located else {}),
    }

    def fill(folder: Path) -> None:
        done = 0
        for split, count in counts.items():
            (folder / "images" / split).mkdir(parents=True)
            draw = partial(_write_image, folder / "images", split, seed, stamps, tuple(backgrounds), size.side)
            for _ in _spread(draw, count, workers):
                done += 1
                progress(done)
            variants = range(size.conversations if split == "train" else 1)
            records = [record(split, seed, index, variant) for variant in variants for index in range(count)]
            _write_records(folder / f"{split}.json", records)
            if located and split in LOCATED:
                places = [locate_record(split, seed, index) for index in range(count)]
                _write_records(folder / f"locate-{split}.json", places)

    return write_once(out, _MANIFEST, wanted, fill)


def _write_records(path: Path, records: list[dict]) -> None:
    path.write_text(json.dumps(records, indent=0) + "\n", encoding="utf-8")


def _write_image(
    folder: Path, split: str, seed: int, stamps: Path, backgrounds: Sequence[Path], side: int, index: int
) -> None:
    image = paint(scene_of(split, seed, index), stamps, backgrounds, side)
    (folder / f"{split}/{index:06d}.jpg").write_bytes(encode_jpeg(image))


def _spread(work: Callable[[int], None], count: int, workers: int) -> Iterator[None]:
    if workers <= 1 or count < 100:
        yield from map(work, range(count))
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(work, range(count), chunksize=32)
