"""The sections of a run's config that say what is read, by which model and with which budget: `model`, `zip`, `data`, `eval`.

Every command reads them through `load_config` here, or, where it also needs the sections on training, through
`train.config.load_config`, whose `RunConfig` adds those. So they have the same defaults and the same validation everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data import formats
from data.config_file import ConfigError, Section, parse, read_config_file
from data.formats.common import Columns
from data.precision import suitable_dtype
from visionzip.budgets import as_config
from visionzip.config import ZipConfig
from visionzip.images import MAX_PIXELS
from visionzip.prompts import template_names

__all__ = ["Columns", "ConfigError", "DataConfig", "EvalSection", "ModelSection", "PipelineConfig", "Section", "SourceConfig",
           "load_config"]  # fmt: skip

TRAINING_SECTIONS = ("output_dir", "seed", "train", "trainer", "wandb", "report")
"""Of the same file, not looked at here: `train.config` checks them."""


class ModelSection(Section):
    path: str = Field(description="a model directory or a hub id (LLaVA-1.5: llava-hf/llava-1.5-7b-hf)")
    revision: str | None = Field(None, description="revision of the hub repository")
    trust_remote_code: bool = Field(
        False, description="run Python code from the model's directory; without it such code never runs"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16",
        description="dtype of the frozen weights; auto: bfloat16 if the GPU or CPU supports it, else float32",
    )
    attn_implementation: str | None = Field(
        None, description="sdpa, flash_attention_2, eager …; null: transformers' choice"
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        None, description="quantisation of the frozen LLM (bitsandbytes, GPU only)"
    )
    frozen_dtype: Literal["float8"] | None = Field(
        None,
        description="float8: the frozen LLM's linear layers in 8 bits, in both passes (torchao; not yet measured on a GPU)",
    )
    projector: str | None = Field(None, description="start from this fine-tuned projector instead of the model's own")
    force_projector: bool = Field(
        False, description="load `projector` even if it was trained with another base, encoder or budget"
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _auto_is_resolved(cls, value: Any) -> Any:
        """Here and not later: what a cache or a run was made with is compared by its name."""
        if value != "auto":
            return value
        return suitable_dtype()

    @property
    def source_options(self) -> dict[str, Any]:
        """Arguments that every `from_pretrained` of this model gets. `trust_remote_code` is among them even where it is False:
        left out, transformers asks on the terminal."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


def _one_of(value: str, names: list[str], what: str) -> str:
    if value not in names:
        raise ValueError(f"there is no {what} {value!r}; there are {', '.join(names)}")
    return value


class SourceConfig(Section):
    """One place records come from."""

    path: str = Field(
        description="a .json or .jsonl file, a Parquet/Arrow file or folder, or the name of a hub data set"
    )
    format: str = Field(default="auto", description="layout of a record; auto decides by each record's columns")
    reader: Literal["auto", "json", "datasets"] = Field(
        default="auto", description="how records are stored; auto decides by the path"
    )
    images: str | None = Field(default=None, description="root of relative image paths; default: the file's own folder")
    name: str | None = Field(default=None, description="name of the source in reports; default: the path's stem")
    subset: str | None = Field(default=None, description="configuration name of a hub data set")
    split: str = "train"
    streaming: bool = Field(default=False, description="read a `datasets` source sequentially, without a local copy")
    columns: Columns = Field(default_factory=Columns)
    fraction: float = Field(default=1.0, gt=0, le=1, description="seeded share; the same records on every machine")
    max_samples: int | None = Field(default=None, gt=0)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="passes through the source per epoch")

    @field_validator("format")
    @classmethod
    def _format_exists(cls, value: str) -> str:
        return _one_of(value, ["auto", *formats.list_formats()], "format")

    @property
    def label(self) -> str:
        return self.name or Path(self.path).stem or self.path


class DataConfig(Section):
    """What is read and how it becomes token ids."""

    sources: list[SourceConfig] = Field(min_length=1)
    template: str = Field(default="chat", description="chat (the processor's own), llava_v1, plain, paligemma")
    max_length: int = Field(default=2048, ge=16, description="tokens, images included")
    overlong: Literal["cut", "reject"] = Field(
        default="cut", description="cut text behind the last image as LLaVA does (never through an image), or reject"
    )
    max_rejected: float = Field(
        default=0.01, ge=0, le=1, description="a run stops when more than this share of the records is bad; 3 bad records "
        "(or one in 20 of fewer than 60) are always allowed, unless this is 0",
    )  # fmt: skip
    pad_images: bool | Literal["auto"] = Field(
        default="auto",
        description="pad to a square with the mean colour as LLaVA-1.5 does; auto: where the image processor would crop. "
        "Exports record it (ZipConfig.pad_images)",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS, gt=0, description="an image with more pixels is rejected before it is decoded"
    )
    frames: int = Field(default=8, ge=1, description="frames taken from a video, uniformly")
    subset_seed: int = Field(
        default=0, description="seed for `fraction` and `max_samples`; deliberately independent of the run's seed"
    )
    cache: str | None = Field(
        default=None,
        description="folder of precomputed visual tokens (visionzip cache); images are not read then, and the encoder does not run",
    )
    batching: Literal["packed", "length", "random"] = Field(
        default="packed",
        description="how the samples of a step are divided into micro-batches. packed: about equally many tokens in each, "
        "in one row without padding (`length` if the model does not support it); length: padded, similar lengths together; random",
    )
    cache_dir: str | None = Field(
        default=None, description="where indexes of JSON files are stored; default ~/.cache/visionzip-ft"
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        if isinstance(given, dict) and "image_aspect_ratio" in given:
            raise ValueError(
                "image_aspect_ratio is called pad_images now: true for pad, false for keep, auto (the default) for auto"
            )
        return given

    @field_validator("template")
    @classmethod
    def _template_exists(cls, value: str) -> str:
        return _one_of(value, template_names(), "template")

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


class EvalSection(Section):
    sources: list[SourceConfig] = Field(min_length=1, description="held-out files, laid out like data.sources")
    cache: str | None = Field(
        None,
        description="folder of the held-out images' visual tokens (visionzip cache); full tokens still read pixels",
    )
    max_questions: int | None = Field(None, ge=1, description="ask at most this many questions, the first ones")
    batch_size: int = Field(8, ge=1, description="questions per batch, in each process")
    max_new_tokens: int = Field(32, ge=1)
    metric: str = Field("exact_match", description="how an answer is scored; see train/metrics/")
    budgets: list[int | float | str] | None = Field(
        None,
        description="more budgets at which the fine-tuned model (without one, the base model) is evaluated: 8, 27+5, 0.1; images are "
        "encoded again for each",
        exclude_if=lambda budgets: budgets is None,
    )
    compare: list[Literal["full", "training_free"]] = Field(
        ["full", "training_free"], description="models evaluated besides the fine-tuned one"
    )

    @field_validator("budgets")
    @classmethod
    def _budgets_can_be_read(cls, budgets: list[int | float | str] | None) -> list[int | float | str] | None:
        if budgets == []:
            raise ValueError("the list of budgets is empty; name at least one, or leave it out")
        for budget in budgets or ():
            as_config(budget, ZipConfig.model_validate({}))
        return budgets


class PipelineConfig(Section):
    """The sections that are not about training alone."""

    model: ModelSection
    zip: ZipConfig = Field(
        default_factory=lambda: ZipConfig.model_validate({}), description="which visual tokens are kept"
    )
    data: DataConfig
    eval: EvalSection | None = Field(None, description="held-out questions; null: no evaluation")

    @model_validator(mode="after")
    def _pad_images_is_one_switch(self) -> PipelineConfig:
        """What is trained keeps it in `zip`; whoever prepares images goes by `data`."""
        told = {section.pad_images for section in (self.zip, self.data) if "pad_images" in section.model_fields_set}
        if len(told) > 1:
            raise ValueError(
                f"zip.pad_images is {self.zip.pad_images} and data.pad_images {self.data.pad_images}: they are the same switch, "
                "leave one of them out"
            )
        if told:
            (value,) = told
            self.data.pad_images = value
            self.zip = self.zip.model_copy(update={"pad_images": value})
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a run's YAML file, put `key=value` overrides over it, and validate all but its `TRAINING_SECTIONS`.

    Raises:
        ConfigError: unreadable file, bad override, or any number of bad keys and values, all in one message.
    """
    plain = read_config_file(path, overrides)
    return parse(
        PipelineConfig, {key: value for key, value in plain.items() if key not in TRAINING_SECTIONS}, str(path)
    )
