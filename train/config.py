"""`RunConfig`: everything a run is told, typed, with every mistake reported at once under its dotted path."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.config import DataConfig, SourceConfig
from data.yaml_config import read_yaml
from train.arguments import TrainerSection, trainer_mistakes
from visionzip import ZipConfig


class ConfigError(ValueError):
    """The config can't be used. The message lists every mistake with its dotted path."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=False)


class ModelSection(Section):
    path: str = Field(description="a model directory or a hub id (LLaVA-1.5: llava-hf/llava-1.5-7b-hf)")
    revision: str | None = Field(None, description="of the hub repository")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="of the frozen weights")
    attn_implementation: str | None = Field(None, description="sdpa, flash_attention_2 …; null: transformers' choice")
    quantization: Literal["8bit", "4bit"] | None = Field(None, description="of the frozen LLM, bitsandbytes, GPU only")
    projector: str | None = Field(None, description="start from this fine-tuned projector in place of the model's own")
    force_projector: bool = Field(False, description="… although it was trained with something else")


class LoraSection(Section):
    on: list[Literal["projector", "llm"]] = Field(min_length=1, description="where adapters go: projector, llm")
    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | None = Field(None, description="names of linear layers inside these parts; null: all of them")

    @model_validator(mode="before")
    @classmethod
    def _on_is_a_key(cls, given: Any) -> Any:
        """YAML 1.1 reads a bare `on` as true, and JSON makes that key "true"."""
        return (
            {"on" if key == "true" else key: value for key, value in given.items()}
            if isinstance(given, dict)
            else given
        )


class DistillSection(Section):
    """The uncompressed model's answers as the target, computed once: python -m train.teacher --config …"""

    cache: str | None = Field(None, description="folder of its answers; a run needs them, a sweep makes its own")
    weight: float = Field(1.0, gt=0, le=1, description="share in the loss; cross-entropy has the rest")
    top_k: int = Field(16, ge=1, description="words kept of each answer's distribution, the rest counted as one")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="both distributions are softened by it")


class TrainSection(Section):
    """What trains. An allow-list: whatever is not named here is frozen."""

    parts: list[Literal["projector", "llm"]] = Field(["projector"], description="trained in full: projector, llm")
    lora: LoraSection | None = Field(None, description="low-rank adapters through PEFT, beside what is trained in full")
    distill: DistillSection | None = Field(
        None, description="learn what the uncompressed model answers; null: only labels"
    )
    share_prefix: bool = Field(
        True,
        description="compute what all samples begin with once; only where the LLM is frozen and whole, exact there",
    )
    expect_parameters: int | None = Field(None, ge=1, description="stop when the trainable count is another")

    @model_validator(mode="after")
    def _something_trains_once(self) -> TrainSection:
        if not self.parts and self.lora is None:
            raise ValueError("nothing would train; name at least one of projector, llm in parts, or give lora")
        twice = set(self.parts) & set(self.lora.on if self.lora else ())
        if twice:
            raise ValueError(
                f"{', '.join(sorted(twice))} can't be trained in full and have LoRA; name it in one of them"
            )
        return self


class EvalSection(Section):
    sources: list[SourceConfig] = Field(min_length=1, description="held-out files, laid out like data.sources")
    cache: str | None = Field(
        None,
        description="folder of the held-out pictures' visual tokens (python -m data.cache); full tokens still read pixels",
    )
    max_questions: int | None = Field(None, ge=1, description="at most this many, the first ones")
    batch_size: int = Field(8, ge=1, description="questions answered at once by a process")
    max_new_tokens: int = Field(32, ge=1)
    compare: list[Literal["full", "training_free"]] = Field(
        ["full", "training_free"], description="what is measured beside the fine-tuned model"
    )


class WandbSection(Section):
    enabled: bool = True
    project: str = "visionzip-ft"
    name: str | None = Field(None, description="of the run; null: output_dir's last part")
    group: str | None = None
    tags: list[str] = []
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, else offline. WANDB_MODE in the environment goes first"
    )


class ReportSection(Section):
    enabled: bool = True
    pictures: int = Field(4, ge=0, description="held-out pictures drawn with the kept patches marked")
    look_every: int | None = Field(
        None, ge=0, description="steps between looks at these pictures on the W&B page, with the answers of the moment; "
        "null: ten times a run, 0: never. Not under ZeRO-3",
    )  # fmt: skip


class RunConfig(Section):
    """One run. The YAML file has these sections; any key can be overridden as `section.key=value`."""

    output_dir: str = Field(description="checkpoints, logs, projector and report go here")
    seed: int = Field(0, ge=0, description="of the data order and every random generator")
    model: ModelSection
    zip: ZipConfig = Field(
        default_factory=lambda: ZipConfig.model_validate({}), description="what is kept of a picture"
    )
    train: TrainSection = Field(default_factory=lambda: TrainSection.model_validate({}))
    data: DataConfig
    eval: EvalSection | None = Field(None, description="held-out questions; null: no evaluation")
    trainer: TrainerSection = Field(default_factory=lambda: TrainerSection.model_validate({}))
    wandb: WandbSection = Field(default_factory=lambda: WandbSection.model_validate({}))
    report: ReportSection = Field(default_factory=lambda: ReportSection.model_validate({}))

    @model_validator(mode="after")
    def _parts_fit_together(self) -> RunConfig:
        if self.model.quantization and "llm" in self.train.parts:
            raise ValueError(
                "model.quantization and train.parts: a quantised LLM can't be trained in full; use train.lora"
            )
        if self.model.quantization and self.trainer.sharded:
            raise ValueError(
                "model.quantization: quantised weights can't be sharded by ZeRO-3; use trainer.deepspeed=zero2"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, put `key=value` overrides over it, validate.

    Raises:
        ConfigError: unreadable file, bad override, or any number of bad keys and values, all in one message.
    """
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        plain = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; see configs/ for the ready ones") from None
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} can't be read as YAML: {error}") from None
    wrong = [item for item in overrides if "=" not in item.lstrip("=")]
    if wrong:
        raise ConfigError(f"{', '.join(map(repr, wrong))}: expected key=value, for example trainer.learning_rate=1e-4")
    try:
        plain = read_yaml(path, overrides) if overrides else plain
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"the overrides {list(overrides)} do not fit {path}: {error}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} holds a {type(plain).__name__}; expected sections such as model:, data:, trainer:")
    return parse_config({str(key): value for key, value in plain.items()}, source=str(path))


def parse_config(plain: dict[str, Any], source: str = "config") -> RunConfig:
    """A plain dict → RunConfig. Types are strict: `"4"` is no number, and nothing is guessed.

    Raises:
        ConfigError: every mistake with its dotted path.
    """
    try:
        text = json.dumps(plain)  # strict JSON mode takes lists for tuples and dicts for models, but no "4" for 4
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        return RunConfig.model_validate_json(text, strict=True)
    except ValidationError as error:
        found = {line for item in error.errors() for line in _line(item).split("\n")}
        # A section's own cross-checks only run once its fields are right; the user wants both lists at once.
        lines = sorted(found | set(trainer_mistakes(plain.get("trainer"))))
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in lines)) from None


def _line(error: Any) -> str:
    """`path: what was found and expected`, with a guess where a key is not known."""
    parts = [str(part) for part in error["loc"]]
    if parts[-1:] and parts[-1] in {"int", "float", "str", "bool"}:  # pydantic names the branch of a union there
        parts = parts[:-1]
    path = ".".join(parts) or "config"
    if error["type"] == "extra_forbidden":
        return f"{path}: no such key{did_you_mean(parts[-1], known_keys(parts[:-1]))}"
    if error["type"] == "missing":
        return f"{path}: is needed and not set"
    if path == "trainer" and error["type"] == "value_error":
        return str(error["ctx"]["error"])  # names its own paths, one a line
    found = error.get("input")
    shown = "" if isinstance(found, dict | list) or error["type"] == "value_error" else f" (found {found!r})"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}{shown}"


def did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def known_keys(path: list[str]) -> list[str]:
    """The keys of the section that a dotted path leads to."""
    model: Any = RunConfig
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


def to_yaml(config: RunConfig) -> str:
    """The resolved config, as `--print-config` shows it and as it is kept with the run."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _kind(annotation: Any) -> str:
    """`int | float`, `'a' | 'b' | null` …: a type as somebody who writes YAML would say it."""
    if annotation is type(None):
        return "null"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_kind, inner))
    if origin is list:
        return f"list of {_kind(inner[0])}"
    return str(getattr(annotation, "__name__", annotation))


def describe() -> str:
    """Every key with its type, default and meaning: the second half of `--help`."""
    lines: list[str] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            inner = section_of(field.annotation)
            if inner is not None:
                mark = "[0]." if "list" in str(field.annotation) else "."
                lines.append(
                    f"\n{prefix}{name}{'' if field.is_required() else '  (optional)'}  {field.description or ''}"
                )
                walk(inner, f"{prefix}{name}{mark}")
                continue
            default = "needed" if field.is_required() else f"= {field.get_default(call_default_factory=True)!r}"
            lines.append(f"  {prefix}{name}: {_kind(field.annotation)} {default}  {field.description or ''}".rstrip())

    walk(RunConfig, "")
    return "\n".join(lines)
