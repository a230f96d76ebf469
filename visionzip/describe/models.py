"""Whole models: what they consist of, whether they can be compressed, and how many tokens a picture takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from visionzip.config import ZipConfig
from visionzip.describe.base import Description, kind, number, size
from visionzip.describe.exports import total
from visionzip.export.card import budget_words
from visionzip.families import FAMILIES


@kind("model", rank=30)
def model(path: Path) -> Description | None:
    if not (path / "config.json").is_file():
        return None
    try:
        found = _of(str(path))
    except (OSError, ValueError, KeyError) as error:
        return Description("a directory with a config.json that transformers can't read", problems=[str(error)])
    weights = [*path.glob("*.safetensors"), *path.glob("*.bin")]
    found.facts["Size"] = size(total(path))
    if not weights:
        found.problems.append("there are no weights in it (no .safetensors, no .bin)")
    if not any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        found.problems.append("there is no processor in it (no processor_config.json)")
    return found


def hub_model(name: str) -> Description:
    """A model on a hub, by its config alone.

    Raises:
        ValueError: when there is none.
    """
    try:
        found = _of(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is nothing at {name}, and no model of that name can be read from the hub") from error
    found.path = name
    return found


def _of(source: str) -> Description:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    stored = config.__dict__.pop("visionzip", None)
    config.__dict__.pop("auto_map", None)
    found = Description(
        f"a model, {(config.architectures or [config.model_type])[0]}", facts={"Type": config.model_type}
    )
    family = FAMILIES.get(config.model_type)
    if family is None:
        found.what += ", which this toolkit can't compress"
        found.facts["Can be compressed"] = f"no; supported types: {', '.join(FAMILIES.names())}"
        return found
    with torch.device("meta"):  # sizes without memory
        shell: Any = AutoModelForImageTextToText.from_config(config)
    counts = {"all": sum(p.numel() for p in shell.parameters())}
    for part, name in {**family.frozen, **{f"projector {name}": name for name in family.projectors}}.items():
        try:
            counts[part] = sum(p.numel() for p in shell.get_submodule(name).parameters())
        except AttributeError:
            continue  # a variant without this part
    found.facts["Parameters"] = f"{number(counts.pop('all'))}: " + ", ".join(
        f"{part} {number(n)}" for part, n in counts.items()
    )
    found.facts["Weights"] = str(config.dtype or "float32").removeprefix("torch.")
    stock = family(shell).stock_count()
    found.facts["Tokens a picture"] = f"{stock:,}" if stock is not None else "depends on the picture's size"
    if stored:
        found.what += ", that was compressed with VisionZip"
        found.facts["Kept of a picture"] = budget_words(ZipConfig(**stored).model_dump())
    else:
        found.facts["Can be compressed"] = "yes"
        found.use = [
            f'model, processor = visionzip.load("{source}", config=ZipConfig(dominant=…, contextual=…))',
            f"visionzip chat {source} --dominant … --contextual … --image photo.jpg",
        ]
    return found
