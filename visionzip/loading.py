"""From something on disk or on a hub to a compressed model and its processor, in one call; and back to disk in another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from visionzip.attach import Attachment, attach, attached, unwrap
from visionzip.config import ZipConfig
from visionzip.export.base import FORMATS, Format, Trained, put, read, recognise, with_metadata
from visionzip.export.card import write_card
from visionzip.export.files import free, staged
from visionzip.hub import local_copy
from visionzip.projector import plain_state, refuse_strangers


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
    """A compressed model and its processor: ``model, processor = visionzip.load("runs/demo/projector")``.

    Args:
        path: what was fine-tuned, in any export format (file, directory or hub id), or a model (directory or hub id).
        device: where to put it; default: the GPU if there is one.
        dtype: of the frozen weights, as in ``from_pretrained``.
        config: what to keep; default: what the projector was trained with, or what the model's config says.
        base: the model a projector goes into, if not the one it names.
        force: load a projector although encoder, LLM or ZipConfig differ from what it was trained with.
        trust_remote_code: run Python code that comes with the (base) model. Never asked for on the terminal.
        model_kwargs: passed on to ``from_pretrained``.

    Raises:
        ImportError: for a model whose processor needs something that is not installed (torchvision, for those that take videos).
        ValueError: when the projector belongs to something else, files are damaged or weights missing, a plain model is loaded
            without a `config`, or there is no such device or dtype.
    """
    place, target, dtype = local_copy(path), usable_device(device), known_dtype(dtype)
    found = recognise(place)
    if found is None and Path(place).is_file():
        read(place)  # says what was expected of a file
    trained = read(place) if found is not None else None
    whole = found is not None and found.whole and base is None
    source = base_of(place, found, trained, base)
    named = trained is not None and base is None
    model, processor = _from_pretrained(
        source, path, dtype, named=named, trust_remote_code=trust_remote_code, **model_kwargs
    )
    stored = trained.header["zip"] if trained else model.config.__dict__.get("visionzip")
    for name in ("visionzip", "auto_map"):  # written by attach, and only meant for the files
        model.config.__dict__.pop(name, None)
    config = config or (ZipConfig(**stored) if stored else None)
    if config is None:
        raise ValueError(f"{path} does not say what to keep; pass config=ZipConfig(dominant=..., contextual=...)")
    attachment = attached(attach(model, processor, config))
    if trained and whole:  # its weights are in the model already
        refuse_strangers(cast(Attachment, attachment), trained.header, str(path), force=force)
    elif trained:
        put(model, trained, str(path), force=force)
    if device is not None or not {"device_map", "quantization_config"} & model_kwargs.keys():
        model.to(target)
    return model.eval(), processor


def usable_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the GPU if there is one.

    Raises:
        ValueError: when there is no such device, or nothing can be put on it.
    """
    try:
        found = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(
            1, device=found
        )  # each backend that is not there raises one of its own: mps NotImplementedError, xpu AssertionError
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device} can't be used here: {str(error).splitlines()[0]}") from error
    return found


def known_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """`dtype` if weights can have it, or ``"auto"``.

    Raises:
        ValueError: for any other.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"weights can't be of dtype {dtype}; expected auto, float32, bfloat16 or float16")
    return dtype


def _from_pretrained(
    source: str, path: Any, dtype: Any, *, named: bool, trust_remote_code: bool, **model_kwargs: Any
) -> tuple[Any, Any]:
    """The plain model and its processor. `named`: it is `path` that says its base model is `source`."""
    from transformers import AutoModelForImageTextToText

    hint = (
        f" (the base model that {path} names; pass base=... if it lies elsewhere)"
        if named and source != str(path)
        else ""
    )
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # said below, by name
            **model_kwargs,
        )
        processor = _processor(source, trust_remote_code)
    except SafetensorError as error:
        raise ValueError(f"the weights in {source} are damaged: {error}") from error
    except OSError as error:
        raise ValueError(f"{source} can't be loaded{hint}: {error}") from error
    model, weights = loaded
    missing, wrong = sorted(weights["missing_keys"]), sorted(weights["mismatched_keys"])
    if missing or wrong:
        shapes = [f"{name} {list(there)}, expected {list(here)}" for name, there, here in wrong]
        raise ValueError(
            f"{source} can't be loaded{hint}: of its weights {len(missing)} are missing ({', '.join(missing[:3])}) "
            f"and {len(wrong)} of another shape ({'; '.join(shapes[:3])})"
        )
    return model, processor


def _processor(source: str, trust_remote_code: bool) -> Any:
    """Raises ``ImportError``, or ``ValueError`` for files that can't be read."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except ImportError as error:
        needs = "; pip install torchvision" if "torchvision" in str(error).lower() else ""
        raise ImportError(
            f"the processor of {source} can't be made: {str(error).strip().splitlines()[0]}{needs}"
        ) from error
    except OSError:
        raise
    except Exception as error:  # of a damaged tokenizer: KeyError, TypeError, a bare Exception …
        raise ValueError(f"the processor in {source} can't be read ({type(error).__name__}: {error})") from error


def base_of(
    place: str | os.PathLike[str], found: Format | None, trained: Trained | None, base: str | os.PathLike[str] | None
) -> str:
    """Where the frozen weights are: `base` if given, else what the export names, looked for around it as well.

    Raises:
        ValueError: when nothing names it.
    """
    if base is not None or found is None:
        return str(base if base is not None else place)
    if found.whole:
        return str(place)
    assert trained is not None
    named = found.base(Path(place), trained.header)
    if not named:
        raise ValueError(f"{place} does not name its base model; pass base=...")
    # A run names its base as its config did, relative to where it was started: the checkout, which holds the run.
    for parent in Path(place).resolve().parents:
        if not Path(named).is_absolute() and (parent / named / "config.json").is_file():
            return str(named if Path(named).is_dir() else parent / named)
    return named


def save(
    source: Any,
    out: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    processor: Any = None,
    metadata: dict[str, Any] | None = None,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
    overwrite: bool = False,
    write: bool = True,
    **options: Any,
) -> Path:
    """Write what was trained, in any of the formats, with a model card: ``visionzip.save(model, "out", "merged")``.

    Args:
        source: an attached model, or the path or hub id of an earlier export, which is converted.
        out: a directory that does not exist yet, or is empty.
        format: safetensors, llava, merged or peft.
        processor: of a model given as `source`; default: the one it was attached with.
        metadata: anything JSON can hold, kept with it: ``data``, ``steps``, ``results`` go into the card.
        base: for a path as `source`, the model it belongs to, where that is not the one it names.
        force: merge although encoder, LLM or ZipConfig differ from what it was trained with.
        overwrite: replace the export that is at `out`.
        write: under ZeRO-3 all ranks call this, one of them with ``write=True``.
        options: the format's own, such as ``vision_tower`` for llava.

    Returns:
        `out`.

    Raises:
        FileExistsError: when there is something at `out` already, and `overwrite` is not set or it is no export.
        ValueError: when the format can't hold what was trained, or `source` is no export.
    """
    form = FORMATS[format]
    free(out, overwrite=overwrite, ours=recognise(out) is not None)  # before a model is loaded for nothing
    if isinstance(source, str | os.PathLike):
        place = local_copy(source)
        trained = read(place)
        model = None
        if form.whole or (trained.adapters and form.name != "peft"):
            model, processor = load(place, "cpu", base=base, force=force)
            fresh = Trained.of(model)
            header = {**trained.header, "fingerprint": fresh.header["fingerprint"]}
            trained = Trained(header, {**fresh.projector, **trained.projector}, fresh.adapters, fresh.adapter_config)
        if base is not None:
            options["base"] = base
    else:
        attachment = attached(source)
        model, processor = source, processor or (attachment.processor if attachment else None)
        trained = Trained.of(source)
    trained = with_metadata(trained, metadata or {})
    if not write:
        if form.whole and model is not None:
            plain_state(unwrap(model))  # takes part in gathering what the writing rank needs
        return Path(out)
    with staged(out, overwrite=overwrite) as aside:
        form.write(trained, aside, model=model, processor=processor, name=Path(out).name, **options)
        write_card(aside, trained.header, form.name)
    return Path(out)
