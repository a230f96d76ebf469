"""What a token cache was made with: written beside its shards, named by each of them, compared by every run that reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data.cache.shards import MadeFor, made_for
from data.config import DataConfig
from data.images import PixelImages
from data.storage import open_part, part_path
from visionzip import ZipConfig
from visionzip.budgets import ladder
from visionzip.families import family_for
from visionzip.fingerprint import differences, fingerprint

MANIFEST = "cache.json"
FORMAT = "visionzip-tokens/2"


class CacheError(ValueError):
    """The cache is not there, or was made with something else; the message says with what."""


def identity(model: Any, processor: Any, zip_config: ZipConfig, data: DataConfig, dtype: str) -> dict[str, Any]:
    """Everything that the cached tokens depend on but the images themselves. `model` is attached; its LLM is not needed."""
    return {
        **settings(processor, zip_config, data, dtype),
        "encoder": fingerprint(model, {"encoder": family_for(model).frozen["encoder"]}),
    }


def settings(processor: Any, zip_config: ZipConfig, data: DataConfig, dtype: str) -> dict[str, Any]:
    """`identity` without the encoder's weights."""
    pixels = PixelImages(data, processor)
    image = processor.image_processor
    options = {
        key: value
        for key, value in json.loads(image.to_json_string()).items()
        if key not in ("processor_class", "name_or_path")
    }
    return {
        "format": FORMAT,
        "zip": describe_zip(zip_config),
        "preprocessing": {
            "image_processor": type(image).__name__,
            **options,
            "pad_to_square": list(pixels.colour) if pixels.pad else False,
            "frames": data.frames,
        },
        "dtype": dtype,
    }


def describe_zip(config: ZipConfig) -> dict[str, Any]:
    """The part of the config that tokens depend on: not how often each of several budgets is drawn, nor which one is current."""
    plain = config.model_dump(exclude={"pad_images"})  # what that comes to stands among the preprocessing
    if config.budgets is not None:
        plain |= {"budgets": [list(budget) for budget in ladder(config)], "dominant": None, "contextual": None}
    return plain


def check_identity(folder: str | os.PathLike[str], wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a cache, if it was made with what is `wanted` (`identity`; or `settings`, which says less).

    Raises:
        CacheError: no cache there, or what differs, by name.
    """
    path = Path(folder) / MANIFEST
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = _differences(stored, wanted)
    except FileNotFoundError:
        raise CacheError(
            f"{folder} contains no token cache ({MANIFEST} is missing); create it with: visionzip cache --config ..."
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete the folder and build the cache again"
        ) from None
    if found:
        raise CacheError(
            f"the token cache {folder} was built with other settings: {'; '.join(found)}. Set data.cache to another folder, or delete this one"
        )
    return stored


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`zip.dominant: 54 there, 5 here` …"""
    if stored["format"] != wanted["format"]:
        return [f"format: {stored['format']} there, {wanted['format']} here"]
    found = differences(wanted["encoder"], stored["encoder"]) if "encoder" in wanted else []
    if stored["zip"].get("budgets") is not None:
        stored, wanted = without_budgets_there(stored, wanted)
    for section in ("zip", "preprocessing"):
        keys = sorted(stored[section].keys() | wanted[section].keys())
        found += [
            f"{section}.{key}: {stored[section].get(key)} there, {wanted[section].get(key)} here"
            for key in keys
            if stored[section].get(key) != wanted[section].get(key)
        ]
    if stored["dtype"] != wanted["dtype"]:
        found.append(f"dtype: {stored['dtype']} there, {wanted['dtype']} here")
    return found


def without_budgets_there(stored: dict[str, Any], wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A cache for several budgets can be read at each of them: both without their budgets, if those that are wanted are there."""
    there, here = stored["zip"], wanted["zip"]
    budgets = here.get("budgets") or [[here["dominant"], here["contextual"]]]
    if any(budget not in there["budgets"] for budget in budgets):
        return stored, {**wanted, "zip": {**here, "budgets": budgets, "dominant": None, "contextual": None}}
    left_out = ("budgets", "dominant", "contextual")
    return tuple(  # type: ignore[return-value]
        {**each, "zip": {key: value for key, value in each["zip"].items() if key not in left_out}}
        for each in (stored, wanted)
    )


def cache_at(folder: str | os.PathLike[str]) -> MadeFor:
    """What the shards of the cache in `folder` have to name."""
    return made_for(Path(folder) / MANIFEST)


def claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Write the manifest if there is none, else compare. Any number of processes may do so at once.

    Raises:
        CacheError: the folder is another cache's.
        OSError: it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / MANIFEST
    if target.exists():
        check_identity(folder, wanted)
        return
    part = part_path(target)
    try:
        with open_part(target) as file:
            file.write(json.dumps(wanted, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
            try:
                os.link(part, target)  # fails where it exists, unlike a rename
            except FileExistsError:
                check_identity(folder, wanted)
            except OSError:  # a file system without hard links
                if not target.exists():
                    os.replace(part, target)
                check_identity(folder, wanted)
    except OSError as error:
        error.filename = error.filename or str(target)
        raise
    finally:
        part.unlink(missing_ok=True)
