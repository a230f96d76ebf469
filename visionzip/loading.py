"""From something on disk or on a hub to a compressed model and its processor, in one call; and back to disk in another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from visionzip.attach import attach, attached, unwrap
from visionzip.config import ZipConfig
from visionzip.export.base import FORMATS, RESULTS, Format, Trained, read_export, recognise
from visionzip.export.card import KEPT, find_kept, write_card
from visionzip.export.files import check_target, staged
from visionzip.export.header import check_belongs
from visionzip.export.insert import insert, note_trained, warn_unchecked
from visionzip.hub import local_copy
from visionzip.pretrained import known_dtype, load_model, load_processor, usable_device
from visionzip.projector import check_finite, plain_state, required


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    config: ZipConfig | None = None,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> tuple[Any, Any]:
    """A compressed model and its processor: ``model, processor = visionzip.load("runs/demo")``.

    Args:
        path: what was fine-tuned, in any export format (file, directory or hub id), the directory of a run, or a model
            (directory or hub id).
        device: where to put it; default: the GPU if there is one.
        dtype: of the frozen weights, as in ``from_pretrained``.
        config: what to keep; default: what the projector was trained with, or what the model's config says.
        base: the model a projector goes into, if not the one it names.
        force: load a projector although encoder, LLM or ZipConfig differ from what it was trained with.
        trust_remote_code: run Python code from the base model's files, where it needs some. Exports never do.
        model_kwargs: passed on to ``from_pretrained``.

    Raises:
        ImportError: for a model whose processor needs something that is not installed (torchvision, for those that take videos).
        ValueError: when the projector belongs to something else, files are damaged or weights missing, a plain model is loaded
            without a `config`, or there is no such device or dtype.
    """
    place, target, dtype = local_copy(path), usable_device(device), known_dtype(dtype)
    form = recognise(place)
    trained = (
        read_export(place) if form is not None or Path(place).is_file() else None
    )  # of a file, says what was expected
    whole = form is not None and form.whole and base is None
    source = base_of(place, form, trained, base)
    try:
        trust = trust_remote_code and not whole
        model = load_model(source, dtype=dtype, trust_remote_code=trust, **model_kwargs)
        processor = load_processor(source, trust_remote_code=trust)
    except ValueError as error:
        if trained is None or base is not None or whole:
            raise
        raise ValueError(f"{error} (the base model that {path} names; pass base=... if it is elsewhere)") from error
    stored = trained.header.zip if trained else model.config.__dict__.get("visionzip")
    for name in ("visionzip", "auto_map"):  # written by attach, and only meant for the files
        model.config.__dict__.pop(name, None)
    config = config or (ZipConfig.model_validate(stored) if stored else None)
    if config is None:
        raise ValueError(f"{path} does not say what to keep; pass config=ZipConfig(dominant=..., contextual=...)")
    attachment = required(attach(model, processor, config))
    if trained is not None and form is not None and whole:  # its weights are in the model already
        check_belongs(attachment, trained.header, str(path), force=force)
        warn_unchecked(trained.header, str(path))
        note_trained(attachment, trained.header)
        damage = [] if force else form.problems(Path(place))
        if damage:
            raise ValueError(f"{path}: {'; '.join(damage)}. Export or download it again, or pass force=True (--force)")
    elif trained:
        insert(model, trained, str(path), force=force)
    if device is not None or not {"device_map", "quantization_config"} & model_kwargs.keys():
        model.to(target)
    return model.eval(), processor


def base_of(
    place: str | os.PathLike[str], form: Format | None, trained: Trained | None, base: str | os.PathLike[str] | None
) -> str:
    """Where the frozen weights are: `base` if given, else what the export names.

    Raises:
        ValueError: when nothing names it, or it is a folder that is not there.
    """
    if base is not None or form is None or form.whole:
        return str(base if base is not None else place)
    assert trained is not None
    named = trained.header.base_model
    if not named:
        raise ValueError(f"{place} does not name its base model; pass base=...")
    found = find_folder(named, Path(place))
    if found is not None:
        return str(found)
    if Path(named).is_absolute():
        raise ValueError(
            f"{place} was trained on the model in {named}, which is not there; pass base=... if it is elsewhere"
        )
    try:
        return str(local_copy(named))  # one question to the hub; transformers would ask for each file, several times
    except ValueError as error:
        raise ValueError(f"{error} (the base model that {place} names; pass base=... if it is elsewhere)") from error


def find_folder(named: str, place: Path) -> Path | None:
    """The folder `named`, or the one that has its place in the checkout that `place` is in: checkouts are moved and copied."""
    if Path(named).is_dir():
        return Path(named)
    parts = [part for part in Path(named).parts if part != Path(named).anchor]
    for parent in place.resolve().parents:
        for start in range(len(parts)):
            found = parent.joinpath(*parts[start:])
            if (found / "config.json").is_file():
                return found
    return None


def save(
    source: Any,
    out: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    processor: Any = None,
    metadata: dict[str, Any] | None = None,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    write: bool = True,
    **options: Any,
) -> Path:
    """Write what was trained, in any of the formats, with a model card: ``visionzip.save(model, "out", "merged")``.

    Args:
        source: an attached model, or the path or hub id of an earlier export (or of a run), which is converted.
        out: a directory that does not exist yet, or is empty.
        format: safetensors, llava, merged or peft.
        processor: of a model given as `source`; default: the one it was attached with.
        metadata: anything JSON can hold, kept with it: ``data``, ``steps``, ``results`` go into the card.
        base: for a path as `source`, the model it belongs to, where that is not the one it names.
        force: merge although encoder, LLM or ZipConfig differ from what it was trained with.
        trust_remote_code: run Python code from the base model's files, where the whole model has to be loaded and needs some.
        overwrite: replace the export that is at `out`.
        write: under ZeRO-3 all ranks call this, one of them with ``write=True``.
        options: the format's own, such as ``vision_tower`` for llava.

    Returns:
        `out`.

    Raises:
        FileExistsError: when there is something at `out` already, and `overwrite` is not set or it is not an export.
        OSError: when the disk is full or can't be written; nothing is left at `out` then, or what was there.
        ValueError: when the format can't store what was trained, a weight is not finite, or `source` is not an export.
    """
    form = FORMATS[format]
    if write:
        check_target(out, overwrite=overwrite, is_export=recognise(out) is not None)  # fails before a model is loaded
    if isinstance(source, str | os.PathLike):
        place = local_copy(source)
        trained = read_export(place)
        model = None
        if form.whole or (trained.adapters and form.name != "peft"):
            model, processor = load(place, "cpu", base=base, force=force, trust_remote_code=trust_remote_code)
            fresh = Trained.of(model)
            header = trained.header.model_copy(update={"fingerprint": fresh.header.fingerprint})
            trained = Trained(header, {**fresh.projector, **trained.projector}, fresh.adapters, fresh.adapter_config)
        if base is not None:
            options["base"] = base
    else:
        attachment = attached(source)
        model, processor = source, processor or (attachment.processor if attachment else None)
        trained = Trained.of(source)
        check_finite({**trained.projector, **trained.adapters}, f"nothing is written to {out}")  # on every rank alike
    trained = trained.with_metadata(metadata or {})
    kept = find_kept(Path(place)) if isinstance(source, str | os.PathLike) else None
    return _write(form, trained, Path(out), model, processor, kept=kept, overwrite=overwrite, write=write, **options)


def save_result(
    model: Any, run: str | os.PathLike[str], format: str, metadata: dict[str, Any] | None = None, *, write: bool = True
) -> Path:
    """Write all that a run trained into its directory, as the one result there: what another run left is removed first.

    Args:
        model: attached, with its processor.
        format: ``safetensors`` for a projector, ``peft`` where LoRA was trained too, ``merged`` where the LLM was.
        write: under ZeRO-3 all ranks call this, one of them with ``write=True``.

    Returns:
        The folder of the run's directory that was written: ``projector``, ``adapter`` or ``model``.

    Raises:
        OSError, ValueError: as `save`.
    """
    trained = Trained.of(model, metadata)
    check_finite({**trained.projector, **trained.adapters}, f"nothing is written to {run}")  # on every rank alike
    if write:
        for folder in RESULTS.values():
            if folder != RESULTS[format]:
                shutil.rmtree(Path(run) / folder, ignore_errors=True)
    out = Path(run) / RESULTS[format]
    return _write(FORMATS[format], trained, out, model, required(model).processor, overwrite=True, write=write)


def _write(
    form: Format,
    trained: Trained,
    out: Path,
    model: Any,
    processor: Any,
    *,
    overwrite: bool,
    write: bool,
    kept: Path | None = None,
    **options: Any,
) -> Path:
    if not write:
        if form.whole and model is not None:
            plain_state(unwrap(model), keep=False)  # takes part in gathering what the writing rank needs
        return out
    with staged(out, overwrite=overwrite) as aside:
        form.write(trained, aside, model=model, processor=processor, name=out.name, **options)
        if kept is not None:
            shutil.copyfile(kept, aside / KEPT)
        write_card(aside, trained.header, form)
    return out
