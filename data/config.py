"""The `data:` section of a config file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data import templates


def _one_of(value: str, names: list[str], what: str) -> str:
    if value not in names:
        raise ValueError(f"there is no {what} {value!r}; there are {', '.join(names)}")
    return value


class Columns(BaseModel):
    """Which column of a record holds what, where the names are not the usual ones. Dots reach into nested records (`meta.id`)."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    image: str | None = Field(default=None, description="a picture or a list of pictures")
    video: str | None = None
    conversations: str | None = Field(default=None, description="the list of turns")
    question: str | None = None
    answer: str | None = Field(default=None, description="an answer, or a list of which the first is taken")
    caption: str | None = None
    types: str | None = Field(default=None, description="one question type a round")


class SourceConfig(BaseModel):
    """One place records come from."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(
        description="a .json or .jsonl file, a Parquet/Arrow file or folder, or the name of a hub data set"
    )
    format: str = Field(default="auto", description="layout of a record; auto goes by each record's columns")
    reader: Literal["auto", "json", "datasets"] = Field(
        default="auto", description="how records are stored; auto goes by the path"
    )
    images: str | None = Field(
        default=None, description="root of relative picture paths; default: the file's own folder"
    )
    name: str | None = Field(default=None, description="how the source is called in reports; default: the path's stem")
    subset: str | None = Field(default=None, description="configuration name of a hub data set")
    split: str = "train"
    streaming: bool = Field(default=False, description="read a `datasets` source as it comes, without a local copy")
    columns: Columns = Field(default_factory=Columns)
    fraction: float = Field(default=1.0, gt=0, le=1, description="seeded share; the same records on every machine")
    max_samples: int | None = Field(default=None, gt=0)
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="how often the source is gone through in an epoch"
    )

    @field_validator("format")
    @classmethod
    def _format_exists(cls, value: str) -> str:
        from data.formats import names  # here: the layouts import this module

        return _one_of(value, ["auto", *names()], "format")

    @property
    def label(self) -> str:
        return self.name or Path(self.path).stem or self.path


class DataConfig(BaseModel):
    """What is read and how it becomes token ids."""

    model_config = ConfigDict(extra="forbid")

    sources: list[SourceConfig] = Field(min_length=1)
    template: str = Field(default="chat", description="chat (the processor's own), llava_v1, plain")
    max_length: int = Field(default=2048, ge=16, description="tokens, pictures included")
    overlong: Literal["cut", "reject"] = Field(
        default="cut", description="cut text behind the last picture as LLaVA does (never through a picture), or reject"
    )
    max_rejected: float = Field(default=0.01, ge=0, le=1, description="share of bad records at which the run stops")
    image_aspect_ratio: Literal["auto", "pad", "keep"] = Field(
        default="auto",
        description="pad to a square with the mean colour as LLaVA-1.5 does; auto: where the processor crops",
    )
    max_pixels: int = Field(default=100_000_000, gt=0, description="a picture with more is rejected unread")
    frames: int = Field(default=8, ge=1, description="frames taken from a video, uniformly")
    subset_seed: int = Field(
        default=0, description="draws `fraction` and `max_samples`; apart from the run's seed on purpose"
    )
    cache: str | None = Field(
        default=None,
        description="folder of visual tokens computed before (python -m data.cache); no picture is read then, no encoder run",
    )
    batching: Literal["packed", "length", "random"] = Field(
        default="packed",
        description="how a step's samples (always the same) are cut into micro-batches. packed: about as many tokens in each, "
        "in one row without padding (length where the model can't); length: padded, like lengths together; random",
    )
    cache_dir: str | None = Field(
        default=None, description="where indexes of JSON files are kept; default ~/.cache/visionzip-ft"
    )

    @field_validator("template")
    @classmethod
    def _template_exists(cls, value: str) -> str:
        return _one_of(value, templates.names(), "template")

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        seen: dict[str, int] = {}
        for position, source in enumerate(self.sources):
            if source.label in seen:
                raise ValueError(
                    f"sources {seen[source.label]} and {position} are both called {source.label!r}: "
                    "rejected records could not be told apart; give one a `name`"
                )
            seen[source.label] = position
        return self
