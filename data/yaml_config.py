"""A config file with `key=value` put over it: the one reader that training, the inspection and the cache share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The file's content as plain Python values. Keys are dotted and reach into lists: ``data.sources.0.path=…``.

    Values are read as OmegaConf reads YAML, where ``1e-4`` is a number.

    Raises:
        OSError, yaml.YAMLError, omegaconf.errors.OmegaConfBaseException, ValueError, TypeError: as they come.
    """
    from omegaconf import OmegaConf

    read = OmegaConf.load(path)
    for item in overrides:
        key, _, value = item.partition("=")
        OmegaConf.update(read, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=True)
    return OmegaConf.to_container(read, resolve=True)
