"""What the uncompressed model answers to the training questions: written once, learned from by any number of compressed runs.

Every record goes through the untouched model once, with all its visual tokens and its whole conversation; of each supervised token
the `train.distill.top_k` likeliest words are kept. A run that learns from them asks for the same model, data layout and settings,
and leaves out a record whose picture or answer has changed since. Interrupted, the same command goes on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from data.cache import identity
from data.cache.keys import name_of, stat_of
from data.cache.shards import Damaged, Key, Writer, key_of, made_for
from data.cache.store import Store
from data.collate import ANSWER_KEYS
from data.config import DataConfig
from data.dataset import InstructionDataset, build_dataset
from data.processes import own_device, rank_and_world
from data.sample import Reject, Rejection, Sample
from train.build import build_model
from train.config import ConfigError, RunConfig
from train.distill import most_likely
from train.labels import predicted_tokens, supervised
from train.loss import rows_of_head
from train.words import count_of
from visionzip import attached, detach
from visionzip.families import family_for
from visionzip.fingerprint import differences, fingerprint

MANIFEST = "teacher.json"
FORMAT = "visionzip-teacher/1"
ANY_LENGTH = 1 << 30
"""`data.max_length` of the teacher: with all visual tokens a conversation is longer than the run that learns from it allows."""


def describe_teacher(model: Any, processor: Any, config: RunConfig) -> dict[str, Any]:
    """What the answers depend on but the records themselves. Of an attached `model` or of a plain one."""
    assert config.train.distill is not None
    family = family_for(model)
    parts = dict(family.frozen)
    if config.model.projector is None:  # a run may start from another one; the teacher has the base model's own
        parts |= {f"projector {number}": name for number, name in enumerate(family.projectors)}
    layout = identity(model, processor, config.zip, config.data, config.model.dtype)
    return {
        "format": FORMAT,
        "model": fingerprint(model, parts),
        "settings": {
            **layout["preprocessing"],
            "dtype": config.model.dtype,
            "template": config.data.template,
            "top_k": config.train.distill.top_k,
            "temperature": config.train.distill.temperature,
        },
    }


def check_teacher(folder: str | None, wanted: dict[str, Any]) -> Path:
    """The folder, if it holds answers made with what is `wanted`.

    Raises:
        ConfigError: no answers there, or what they were made with, by name.
    """
    if folder is None:
        raise ConfigError(
            "train.distill.cache: is not set; name a folder, and fill it: python -m train.teacher --config …"
        )
    try:
        stored = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"train.distill.cache: {folder} holds no answers ({error}); python -m train.teacher makes them"
        ) from None
    found = (
        []
        if stored.get("format") == wanted["format"]
        else [f"format {stored.get('format')}, expected {wanted['format']}"]
    )
    if not found:
        common = {part: value for part, value in stored["model"].items() if part in wanted["model"]}
        found = differences(wanted["model"], common)
        keys = sorted(stored["settings"].keys() | wanted["settings"].keys())
        pairs = [
            (key, stored["settings"].get(key), json.loads(json.dumps(wanted["settings"].get(key)))) for key in keys
        ]
        found += [f"{key}: {there} there, {here} here" for key, there, here in pairs if there != here]
    if found:
        raise ConfigError(
            f"train.distill.cache: the answers in {folder} were made with something else: {'; '.join(found)}. Name another folder, "
            "or delete this one"
        )
    return Path(folder)


def claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Say what the folder is for, or compare where that was said before. Any number of processes may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        aside = folder / f".{MANIFEST}.{os.uname().nodename}.{os.getpid()}"
        aside.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        with suppress(OSError):
            os.replace(aside, folder / MANIFEST)
    check_teacher(str(folder), wanted)


def key_of_sample(sample: Sample) -> Key:
    """Of what is said and of where its pictures are."""
    messages = [
        [message.role, [part if isinstance(part, str) else asdict(part) for part in message.parts]]
        for message in sample.messages
    ]
    names = [
        name_of(media) or key_of(media.source if isinstance(media.source, bytes) else b"") for media in sample.media
    ]
    return key_of(json.dumps([messages, names], sort_keys=True).encode())


def stats(sample: Sample) -> Tensor:
    """Sizes and times ``(M, 2)`` of the sample's files, −1 where there is none (any more)."""
    return torch.tensor([stat_of(media) for media in sample.media], dtype=torch.int64).reshape(-1, 2)


class WithAnswers:
    """A sample → an item as the encoder makes it, with the teacher's answers: of each predicted token `teacher_words` (S, k) and
    their `teacher_log_probs` (S, k). A conversation that the run cuts has those of what is left."""

    def __init__(self, encoder: Any, folder: str | os.PathLike[str]) -> None:
        self.encoder, self.store = encoder, Store(folder, made_for(Path(folder) / MANIFEST))

    def __call__(self, sample: Sample) -> dict[str, Any]:
        item = self.encoder(sample)
        try:
            entry = self.store.get(key_of_sample(sample))
        except Damaged as error:
            raise Reject("damaged answers", f"{error}; run python -m train.teacher again") from error
        if entry is None:
            raise Reject("no teacher's answer", "run python -m train.teacher with this config")
        _, kept = entry
        now = stats(sample)
        if not bool(((now == kept["stats"]) | (now < 0)).all()):
            raise Reject(
                "stale answer", "the picture has changed since the teacher saw it; run python -m train.teacher again"
            )
        answers = predicted_tokens(item["labels"])
        if not torch.equal(answers, kept["answers"][: len(answers)].long()):
            raise Reject("stale answer", "the teacher was asked for other words; delete its folder and make it again")
        return {**item, **{name: kept[name][: len(answers)] for name in ANSWER_KEYS}}


class Recorded:
    """An item that remembers its sample; what the teacher's data set gives."""

    def __init__(self, encoder: Any, store: Store) -> None:
        self.encoder, self.store = encoder, store

    def __call__(self, sample: Sample) -> tuple[Sample, dict[str, Any]] | None:
        """None where the answer is there already and still right."""
        with suppress(Damaged):
            entry = self.store.get(key_of_sample(sample))
            if entry is not None and torch.equal(entry[1]["stats"], stats(sample)):
                return None
        return sample, self.encoder(sample)


def uncompressed(config: DataConfig) -> DataConfig:
    """The same data for a model that sees all visual tokens."""
    return config.model_copy(update={"cache": None, "max_length": ANY_LENGTH})


@torch.no_grad()
def answer_rows(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Logits ``(S, V)`` of the predicted tokens, for each row of a collated batch with labels ``(B, L)``."""
    inputs = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    keep = supervised(inputs.pop("labels"))
    with rows_of_head(model.get_output_embeddings(), keep):
        logits = model(**inputs, use_cache=False).logits
    return list(logits.split(keep.sum(dim=1).tolist()))


def asked(
    dataset: InstructionDataset, places: Sequence[int], batch: int, make: Any
) -> Iterator[tuple[list[Sample], dict[str, Any]]]:
    """Batches of the records at `places`: their samples and what the collator makes of them. Bad records are left out.

    Args:
        make: sample → (sample, item), or None to pass it over.
    """
    collate = dataset.collator()
    for items in DataLoader(Subset(dataset.making(make), places), batch_size=batch, collate_fn=list):
        good = [item for item in items if item is not None and not isinstance(item, Rejection)]
        if good:
            yield [sample for sample, _ in good], collate([item for _, item in good])


def fill(
    folder: Path,
    model: Any,
    processor: Any,
    config: RunConfig,
    *,
    process: int = 0,
    processes: int = 1,
    batch: int = 16,
) -> int:
    """This process's share of the answers; `model` is not attached. Returns how many records were asked."""
    assert config.train.distill is not None
    dataset = build_dataset(uncompressed(config.data), processor, 0)
    answers = made_for(folder / MANIFEST)
    writer, done = Writer(folder, answers), 0
    try:
        places = range(process, len(dataset), processes)
        for samples, together in asked(dataset, places, batch, Recorded(dataset.encoder, Store(folder, answers))):
            for sample, labels, logits in zip(samples, together["labels"], answer_rows(model, together), strict=False):
                words, log_probs = most_likely(logits, config.train.distill.top_k, config.train.distill.temperature)
                entry = {
                    "stats": stats(sample),
                    "answers": predicted_tokens(labels).int(),
                    "teacher_words": words.int(),
                    "teacher_log_probs": log_probs,
                }
                writer.add(key_of_sample(sample), None, {name: tensor.cpu() for name, tensor in entry.items()})
            done += len(samples)
    finally:
        writer.close()  # what is computed is computed: the next start goes on from here
    Store(folder, answers)
    return done


def ask_teacher(config: RunConfig) -> int:
    """Fill `train.distill.cache`, this process's share of it; returns the exit code.

    Raises:
        ConfigError: no folder named, a streamed source, or a folder with other answers.
    """
    if config.train.distill is None or config.train.distill.cache is None:
        raise ConfigError("train.distill.cache: is not set; name the folder that is to hold the answers")
    if any(source.streaming for source in config.data.sources):
        raise ConfigError("train.distill: a streamed source has no records that could be asked beforehand")
    process, processes = rank_and_world()
    device = own_device()
    base = {"model": config.model.model_copy(update={"projector": None}), "data": uncompressed(config.data)}
    config = config.model_copy(update=base)
    model, processor = build_model(config)
    detach(model)
    model.to(device)
    assert attached(model) is None
    folder = Path(config.train.distill.cache)  # type: ignore[union-attr, arg-type]
    claim(folder, describe_teacher(model, processor, config))
    done = fill(folder, model.eval(), processor, config, process=process, processes=processes)
    print(
        f"process {process} of {processes}: {count_of(done, 'record')} asked; {folder} holds {len(Store(folder, made_for(folder / MANIFEST)))}",
        file=sys.stderr,
    )
    return 0
