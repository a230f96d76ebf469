"""`RunConfig`: everything a run is told, typed, with every mistake reported at once under its dotted path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data.config import EvalSection, ModelSection, PipelineConfig, Section
from data.config_file import ConfigError, parse, read_config_file
from train.arguments import TrainerSection, trainer_mistakes
from train.losses import DEFAULT, LOSSES
from train.metrics import METRICS
from visionzip.budgets import ladder

__all__ = ["ConfigError", "EvalSection", "LoraSection", "ModelSection", "ReportSection", "RunConfig",
           "TrainSection", "WandbSection", "load_config", "parse_config", "to_yaml"]  # fmt: skip


class LoraSection(Section):
    on: list[Literal["projector", "llm"]] = Field(min_length=1, description="parts that get adapters: projector, llm")
    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | None = Field(None, description="names of linear layers inside these parts; null: all")

    @model_validator(mode="before")
    @classmethod
    def _on_is_a_key(cls, given: Any) -> Any:
        """YAML 1.1 reads a bare `on` as true, and JSON makes that key "true"."""
        return (
            {"on" if key == "true" else key: value for key, value in given.items()}
            if isinstance(given, dict)
            else given
        )


class TrainSection(Section):
    """What trains. An allow-list: whatever is not named here is frozen."""

    parts: list[Literal["projector", "llm"]] = Field(["projector"], description="parts trained in full: projector, llm")
    lora: LoraSection | None = Field(
        None, description="low-rank adapters through PEFT, besides the parts that are trained in full"
    )
    loss: str = Field(DEFAULT, description=f"loss of the labels: {', '.join(LOSSES.names())}")
    budgets_per_sample: int = Field(
        1,
        ge=1,
        description="under zip.budgets, at how many of them a sample is trained in one step, spread over their density; the text "
        "before its image is computed once for all",
    )
    share_prefix: bool = Field(
        True,
        description="compute the prefix that all samples share only once; exact, used if the LLM is frozen and not sharded",
    )
    expect_parameters: int | None = Field(
        None, ge=1, description="stop the run if another number of parameters would be trained"
    )

    @field_validator("loss")
    @classmethod
    def _loss_exists(cls, value: str) -> str:
        if LOSSES.get(value) is None:
            raise ValueError(f"there is no loss {value!r}; there are {', '.join(LOSSES.names())}")
        return value

    @model_validator(mode="after")
    def _something_trains_once(self) -> TrainSection:
        if not self.parts and self.lora is None:
            raise ValueError("nothing would train; name projector or llm in parts, or set lora")
        twice = set(self.parts) & set(self.lora.on if self.lora else ())
        if twice:
            raise ValueError(
                f"{', '.join(sorted(twice))} can't be trained both in full and with LoRA; name it in one of parts and lora.on"
            )
        return self


class WandbSection(Section):
    enabled: bool = True
    project: str = "visionzip-ft"
    name: str | None = Field(None, description="name of the run; null: the last part of output_dir")
    group: str | None = None
    tags: list[str] = Field([])
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, else offline. WANDB_MODE in the environment takes precedence"
    )


class ReportSection(Section):
    enabled: bool = True
    images: int = Field(4, ge=0, description="held-out images drawn with the kept patches marked")
    look_every: int | None = Field(
        None, ge=0, description="steps between pages on W&B with these images and the model's current answers; "
        "null: ten times a run, 0: never. Not under ZeRO-3",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, given: Any) -> Any:
        """`images` was called `pictures`, and the `config.yaml` of earlier runs still says so."""
        if isinstance(given, dict) and "pictures" in given:
            rest = {key: value for key, value in given.items() if key != "pictures"}
            return {"images": given["pictures"], **rest}
        return given


class RunConfig(PipelineConfig):
    """One run. The YAML file has these sections; any key can be overridden as `section.key=value`."""

    output_dir: str = Field(description="the run directory: checkpoints, logs, what was trained, report")
    seed: int = Field(0, ge=0, description="seed of the data order and of every random generator")
    train: TrainSection = Field(default_factory=lambda: TrainSection.model_validate({}))
    trainer: TrainerSection = Field(default_factory=lambda: TrainerSection.model_validate({}))
    wandb: WandbSection = Field(default_factory=lambda: WandbSection.model_validate({}))
    report: ReportSection = Field(default_factory=lambda: ReportSection.model_validate({}))

    @model_validator(mode="after")
    def _parts_fit_together(self) -> RunConfig:
        if self.eval is not None and METRICS.get(self.eval.metric) is None:
            raise ValueError(
                f"eval.metric: there is no metric {self.eval.metric!r}; there are {', '.join(METRICS.names())}"
            )
        if self.train.budgets_per_sample > 1 and self.zip.budgets is None:
            raise ValueError(
                "train.budgets_per_sample: there is only one budget; list several in zip.budgets, or leave it out"
            )
        current = (self.zip.dominant, self.zip.contextual)
        if (
            self.zip.budgets is not None
            and self.eval is not None
            and self.eval.cache
            and current not in ladder(self.zip)
        ):
            raise ValueError(
                f"eval.cache has the tokens of zip.budgets, but not of zip.dominant + zip.contextual = {current[0]} + {current[1]}, at "
                "which held-out questions are asked; set these to one of the budgets, or leave eval.cache out"
            )
        if self.model.quantization and "llm" in self.train.parts:
            raise ValueError(
                "model.quantization and train.parts: a quantised LLM can't be trained in full; use train.lora"
            )
        if self.model.frozen_dtype:
            self._llm_stays_frozen_and_whole()
        if self.model.quantization and self.trainer.sharded:
            raise ValueError(
                "model.quantization: quantised weights can't be sharded by ZeRO-3; use trainer.deepspeed=zero2"
            )
        return self

    def _llm_stays_frozen_and_whole(self) -> None:
        what = f"model.frozen_dtype={self.model.frozen_dtype}"
        if "llm" in self.train.parts or (self.train.lora is not None and "llm" in self.train.lora.on):
            raise ValueError(f"{what}: the LLM would be trained; leave llm out of train.parts and train.lora.on")
        if self.model.quantization:
            raise ValueError(f"{what} and model.quantization can't be combined; leave one of them out")
        if self.trainer.sharded:
            raise ValueError(f"{what}: ZeRO-3 can't shard these weights; use trainer.deepspeed=zero2")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, put `key=value` overrides over it, validate.

    Raises:
        ConfigError: unreadable file, bad override, or any number of bad keys and values, all in one message.
    """
    return parse_config(read_config_file(path, overrides), source=str(path))


def parse_config(plain: dict[str, Any], source: str = "config") -> RunConfig:
    """A plain dict → RunConfig.

    Raises:
        ConfigError: every mistake with its dotted path.
    """
    # A section's own cross-checks only run once its fields are right; the user wants both lists at once.
    return parse(RunConfig, plain, source, trainer_mistakes(plain.get("trainer")))


def to_yaml(config: RunConfig) -> str:
    """The resolved config, as `--print-config` shows it and as it is kept with the run."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
