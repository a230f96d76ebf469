"""The uncompressed model's answers to the training questions: computed once, learned from by any number of compressed runs.

Every record goes through the unchanged model once, with all its visual tokens and its whole conversation; for each supervised token
the `train.distill.top_k` likeliest tokens are stored. A run that learns from them must have the same model, data layout and settings,
and rejects a record whose image or answer has changed since. After an interruption the same command continues.
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
from train.labels import mask_predicting, predicted_tokens
from train.loss import rows_of_head
from visionzip import attached, detach
from visionzip.families import family_for
from visionzip.fingerprint import differences, fingerprint
from visionzip.words import count_of

MANIFEST = "teacher.json"
FORMAT = "visionzip-teacher/1"
ANY_LENGTH = 1 << 30
"""`data.max_length` of the teacher: with all visual tokens a conversation is longer than the run that learns from it allows."""


def describe_teacher(model: Any, processor: Any, config: RunConfig) -> dict[str, Any]:
    """What the answers depend on besides the records. `model` may be attached or plain."""
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
    """The folder, if its answers were made with what is `wanted`.

    Raises:
        ConfigError: there are no answers, or they were made with something else (named).
    """
    if folder is None:
        raise ConfigError("train.distill.cache: not set; name a folder, and fill it: visionzip teacher --config …")
    try:
        stored = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"train.distill.cache: {folder} has no answers ({error}); make them: visionzip teacher --config …"
        ) from None
    try:
        found = find_differences(stored, wanted)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"train.distill.cache: {Path(folder) / MANIFEST} is damaged ({type(error).__name__}: {error}); delete the folder and "
            "make the answers again"
        ) from None
    if found:
        raise ConfigError(
            f"train.distill.cache: the answers in {folder} were made with other settings: {'; '.join(found)}. Name another folder, "
            "or delete this one"
        )
    return Path(folder)


def find_differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`top_k: 8 there, 4 here` …"""
    if stored["format"] != wanted["format"]:
        return [f"format {stored['format']}, expected {wanted['format']}"]
    found = differences(
        wanted["model"], {part: values for part, values in stored["model"].items() if part in wanted["model"]}
    )
    there, here = stored["settings"], json.loads(json.dumps(wanted["settings"]))
    keys = sorted(there.keys() | here.keys())
    return found + [
        f"{key}: {there.get(key)} there, {here.get(key)} here" for key in keys if there.get(key) != here.get(key)
    ]


def claim_folder(folder: Path, wanted: dict[str, Any]) -> None:
    """Write the manifest, or compare with it where it exists. Any number of processes may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        aside = folder / f".{MANIFEST}.{os.uname().nodename}.{os.getpid()}"
        aside.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        with suppress(OSError):
            os.replace(aside, folder / MANIFEST)
    check_teacher(str(folder), wanted)


def key_of_sample(sample: Sample) -> Key:
    """A key made of the conversation and the places of its images."""
    messages = [
        [message.role, [part if isinstance(part, str) else asdict(part) for part in message.parts]]
        for message in sample.messages
    ]
    names = [
        name_of(media) or key_of(media.source if isinstance(media.source, bytes) else b"") for media in sample.media
    ]
    return key_of(json.dumps([messages, names], sort_keys=True).encode())


def file_stats(sample: Sample) -> Tensor:
    """Sizes and times ``(M, 2)`` of the sample's files, −1 where there is none (any more)."""
    return torch.tensor([stat_of(media) for media in sample.media], dtype=torch.int64).reshape(-1, 2)


class WithAnswers:
    """A sample → an item as the encoder makes it, with the teacher's answers: for each predicted token `teacher_words` (S, k) and
    their `teacher_log_probs` (S, k). Where the run cuts a conversation, they are those of what is left."""

    def __init__(self, encoder: Any, folder: str | os.PathLike[str]) -> None:
        self.encoder, self.store = encoder, Store(folder, made_for(Path(folder) / MANIFEST))

    def __call__(self, sample: Sample) -> dict[str, Any]:
        item = self.encoder(sample)
        try:
            entry = self.store.get(key_of_sample(sample))
        except Damaged as error:
            raise Reject("damaged answers", f"{error}; run `visionzip teacher` again") from error
        if entry is None:
            raise Reject("no teacher's answer", "run `visionzip teacher` with this config")
        _, kept = entry
        now = file_stats(sample)
        if not bool(((now == kept["stats"]) | (now < 0)).all()):
            raise Reject(
                "stale answer", "the image has changed since the teacher saw it; run `visionzip teacher` again"
            )
        answers = predicted_tokens(item["labels"])
        if not torch.equal(answers, kept["answers"][: len(answers)].long()):
            raise Reject("stale answer", "the teacher saw another answer; delete its folder and make it again")
        return {**item, **{name: kept[name][: len(answers)] for name in ANSWER_KEYS}}


class Recorded:
    """A sample → (sample, item) for the teacher."""

    def __init__(self, encoder: Any, store: Store) -> None:
        self.encoder, self.store = encoder, store

    def __call__(self, sample: Sample) -> tuple[Sample, dict[str, Any]] | None:
        """None where the answer is stored already and still valid."""
        with suppress(Damaged):
            entry = self.store.get(key_of_sample(sample))
            if entry is not None and torch.equal(entry[1]["stats"], file_stats(sample)):
                return None
        return sample, self.encoder(sample)


def uncompressed_data(config: DataConfig) -> DataConfig:
    """The same data for a model that sees all visual tokens."""
    return config.model_copy(update={"cache": None, "max_length": ANY_LENGTH})


@torch.no_grad()
def answer_rows(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Logits ``(S, V)`` of the predicted tokens, for each row of a collated batch with labels ``(B, L)``."""
    inputs = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    keep = mask_predicting(inputs.pop("labels"))
    with rows_of_head(model.get_output_embeddings(), keep):
        logits = model(**inputs, use_cache=False).logits
    return list(logits.split(keep.sum(dim=1).tolist()))


def batches_to_ask(
    dataset: InstructionDataset, places: Sequence[int], batch: int, make: Any
) -> Iterator[tuple[list[Sample], dict[str, Any]]]:
    """Batches of the records at `places`: samples and collated items. Rejected records are left out.

    Args:
        make: sample → (sample, item), or None to skip it.
    """
    collate = dataset.collator()
    for items in DataLoader(Subset(dataset.making(make), places), batch_size=batch, collate_fn=list):
        good = [item for item in items if item is not None and not isinstance(item, Rejection)]
        if good:
            yield [sample for sample, _ in good], collate([item for _, item in good])


def fill_store(
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
    dataset = build_dataset(uncompressed_data(config.data), processor, 0)
    answers = made_for(folder / MANIFEST)
    writer, done = Writer(folder, answers), 0
    try:
        places = range(process, len(dataset), processes)
        for samples, together in batches_to_ask(
            dataset, places, batch, Recorded(dataset.encoder, Store(folder, answers))
        ):
            for sample, labels, logits in zip(samples, together["labels"], answer_rows(model, together), strict=False):
                words, log_probs = most_likely(logits, config.train.distill.top_k, config.train.distill.temperature)
                entry = {
                    "stats": file_stats(sample),
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
        raise ConfigError("train.distill.cache: not set; name a folder for the answers")
    if any(source.streaming for source in config.data.sources):
        raise ConfigError("train.distill: a streamed source is not supported, its records can't be asked beforehand")
    process, processes = rank_and_world()
    device = own_device()
    base = {"model": config.model.model_copy(update={"projector": None}), "data": uncompressed_data(config.data)}
    config = config.model_copy(update=base)
    model, processor = build_model(config)
    detach(model)
    model.to(device)
    assert attached(model) is None
    folder = Path(config.train.distill.cache)  # type: ignore[union-attr, arg-type]
    claim_folder(folder, describe_teacher(model, processor, config))
    done = fill_store(folder, model.eval(), processor, config, process=process, processes=processes)
    print(
        f"process {process} of {processes}: {count_of(done, 'record')} asked; {folder} has {len(Store(folder, made_for(folder / MANIFEST)))}",
        file=sys.stderr,
    )
    return 0
