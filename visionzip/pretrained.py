"""transformers' ``from_pretrained``, with two differences: code of a model's own directory is run only where that was asked
for (transformers would ask on the terminal), and whatever is wrong is one ``ValueError`` that names the source."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from visionzip.words import count_of

#: what a damaged or hostile file raises somewhere inside transformers, torch or tokenizers
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)


def read_config(source: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a model in a directory or on a hub; no weights are loaded.

    Raises:
        ValueError: when there is none, it can't be read, or it needs its own code, which is not trusted.
    """
    from transformers import AutoConfig

    check_exists(source)
    try:
        return AutoConfig.from_pretrained(
            source, revision=revision or "main", trust_remote_code=bool(trust_remote_code)
        )
    except Exception as error:
        raise failure(source, error, "the config of") from error


def describe_mismatch(weights: dict[str, Any]) -> str:
    """What `from_pretrained`'s loading info says against the weights: those that are missing or have another shape; or nothing."""
    missing = sorted(weights["missing_keys"])
    wrong = [f"{name} {list(there)}, expected {list(here)}" for name, there, here in sorted(weights["mismatched_keys"])]
    problems = (
        f"{count_of(len(missing), 'weight')} missing ({', '.join(missing[:3])})" if missing else "",
        f"{count_of(len(wrong), 'weight')} of another shape ({'; '.join(wrong[:3])})" if wrong else "",
    )
    return ", ".join(filter(None, problems))


def load_model(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    loader: Any = None,
    **kwargs: Any,
) -> Any:
    """``AutoModelForImageTextToText.from_pretrained``; weights that are missing or of another shape are an error (transformers
    would draw them at random).

    Args:
        loader: the class whose ``from_pretrained`` is called, where it is another.

    Raises:
        ValueError: as `read_config`, and for weights that are damaged, pickled with code in them, missing or of another shape.
    """
    from transformers import AutoModelForImageTextToText

    check_exists(source)
    options = {"revision": revision or "main", "trust_remote_code": bool(trust_remote_code), **kwargs}
    try:
        loaded: Any = (loader or AutoModelForImageTextToText).from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except (*UNREADABLE, RuntimeError) as error:
        raise failure(source, error) from error
    model, weights = loaded
    if problem := describe_mismatch(weights):
        raise ValueError(f"{source} can't be loaded: {problem}")
    return model


def load_processor(
    source: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """``AutoProcessor.from_pretrained``.

    Raises:
        ImportError: for a processor that needs something that is not installed (torchvision, for those that take videos).
        ValueError: as `read_config`.
    """
    from transformers import AutoProcessor

    check_exists(source)
    try:
        return AutoProcessor.from_pretrained(
            source, revision=revision or "main", trust_remote_code=bool(trust_remote_code)
        )
    except ImportError as error:
        needs = "; pip install torchvision" if "torchvision" in str(error).lower() else ""
        raise ImportError(f"the processor of {source} can't be made: {first_line(error)}{needs}") from error
    except Exception as error:  # a damaged tokenizer raises KeyError, TypeError, a bare Exception …
        raise failure(source, error, "the processor in") from error


def failure(source: object, error: Exception, what: str = "") -> ValueError:
    """`error`, raised while loading `source`, as one sentence."""
    text = first_line(error)
    if "trust_remote_code" in str(error):
        return ValueError(
            f"{source} can only be loaded by running Python code from its own files, which is off; read that code, and pass "
            f"trust_remote_code=True (--trust-remote-code; model.trust_remote_code=true in a config) if you trust it"
        )
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error) or "Weights only load" in str(error):
        return ValueError(
            f"the weights in {source} are a damaged pickle, or one that could run code when read; nothing was run. "
            f"Use weights in safetensors"
        )
    if isinstance(error, SafetensorError):
        return ValueError(f"the weights in {source} are damaged: {text}")
    if isinstance(error, OSError):
        return ValueError(f"{source} can't be loaded: {error}")
    if what:
        return ValueError(f"{what} {source} can't be read ({type(error).__name__}: {text})")
    kind = "" if type(error) in (ValueError, RuntimeError) else f"{type(error).__name__}: "
    return ValueError(f"{source} can't be loaded: {kind}{text}")


def check_exists(source: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` for a path with nothing at it, which transformers would look for on the hub."""
    if not Path(source).exists() and not looks_like_id(source):
        raise ValueError(f"there is nothing at {str(source) or repr('')}, and it is not a hub id (owner/name)")


def looks_like_id(path: str | os.PathLike[str]) -> bool:
    """``owner/name``, as opposed to a path that was mistyped."""
    text = str(path)
    plain = isinstance(path, str) and text.count("/") == 1 and not text.startswith((".", "/", "~")) and "\\" not in text
    return plain and not Path(text.split("/")[0]).is_dir()


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def usable_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the GPU if there is one.

    Raises:
        ValueError: when there is no such device, or nothing can be put on it.
    """
    try:
        found = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend raises one of its own
        raise ValueError(f"device {device} can't be used here: {first_line(error)}") from error
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
