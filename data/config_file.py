"""Reading a config file: YAML, with `key=value` put over it, validated by a pydantic model, every mistake named at once.

The one reader of all commands of `data` and `train`; what may stand in a file is in `data/config.py` and `train/config.py`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from data.storage import DISK_ERRORS


class ConfigError(ValueError):
    """The config can't be used. The message lists every mistake with its dotted path."""


@contextmanager
def config_errors(section: str) -> Iterator[None]:
    """What goes wrong with what `section` names, as a `ConfigError`. A disk that is full (a source is indexed when it is opened)
    is none, and passes."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise ConfigError(f"{section}: {error}") from error


class Section(BaseModel):
    """A part of a config. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=False)


T = TypeVar("T", bound=BaseModel)


def read_config_file(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The file's sections as plain Python values. Keys of overrides are dotted and reach into lists: ``data.sources.0.path=…``.

    Values are read as OmegaConf reads YAML, where ``1e-4`` is a number.

    Raises:
        ConfigError: there is no such file, it is not YAML, or an override does not fit it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    wrong = [item for item in overrides if "=" not in item.lstrip("=")]
    if wrong:
        raise ConfigError(f"{', '.join(map(repr, wrong))}: expected key=value, for example trainer.learning_rate=1e-4")
    try:
        read = OmegaConf.load(path)
        plain = OmegaConf.to_container(read, resolve=not overrides)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; see configs/ for the ready ones") from None
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} can't be read as YAML: {error}") from None
    if not isinstance(plain, dict):
        raise ConfigError(
            f"{path} contains a {type(plain).__name__}; expected sections such as model:, data:, trainer:"
        )
    try:
        for item in overrides:
            key, _, value = item.partition("=")
            new = OmegaConf.from_dotlist([f"value={value}"]).value
            # a mapping adds to a mapping; whatever is of another kind it replaces, as in zip.budgets={least: 8, most: 64} over a list
            both = OmegaConf.is_dict(new) and OmegaConf.is_dict(OmegaConf.select(read, key))
            OmegaConf.update(read, key, new, merge=both)
        plain = OmegaConf.to_container(read, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"the overrides {list(overrides)} do not fit {path}: {error}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def parse(schema: type[T], plain: dict[str, Any], source: str = "config", mistakes: Iterable[str] = ()) -> T:
    """A plain dict → `schema`. Types are strict: `"4"` is not a number, and nothing is guessed.

    Args:
        mistakes: what the caller found beyond that (`dotted.path: what is wrong`), reported where validation fails.

    Raises:
        ConfigError: every mistake with its dotted path.
    """
    try:
        text = json.dumps(plain)  # strict JSON mode takes lists for tuples and dicts for models, but no "4" for 4
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        return schema.model_validate_json(text, strict=True)
    except ValidationError as error:
        found = {line for item in error.errors() for line in _line(item, schema).split("\n")}
        lines = sorted(found | set(mistakes))
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in lines)) from None


def _line(error: Any, schema: type[BaseModel]) -> str:
    """`path: what was found and expected`, with a guess where a key is not known."""
    parts = [str(part) for part in error["loc"]]
    if parts[-1:] and parts[-1] in {"int", "float", "str", "bool"}:  # pydantic names the branch of a union there
        parts = parts[:-1]
    path = ".".join(parts) or "config"
    if error["type"] == "extra_forbidden":
        return f"{path}: no such key{did_you_mean(parts[-1], known_keys(schema, parts[:-1]))}"
    if error["type"] == "missing":
        return f"{path}: is needed and not set"
    if error["type"] == "value_error" and str(error["ctx"]["error"]).startswith(f"{path}."):
        return str(error["ctx"]["error"])  # a section that names its own paths, one a line
    found = error.get("input")
    shown = "" if isinstance(found, dict | list) or error["type"] == "value_error" else f" (found {found!r})"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}{shown}"


def did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def known_keys(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys of the section that a dotted path in `schema` leads to."""
    model: Any = schema
    for part in path:
        if part.isdigit():
            continue
        model = section_of(model.model_fields[part].annotation) if part in getattr(model, "model_fields", {}) else None
        if model is None:
            return []
    return list(model.model_fields)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The BaseModel inside `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = section_of(inner)
        if found is not None:
            return found
    return None
