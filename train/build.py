"""Config → model, processor: what a run and an evaluation start from."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from data.partial import as_config_error, load_without
from train.config import ConfigError, ModelSection, RunConfig
from train.float8 import freeze_in_float8
from visionzip import attach
from visionzip.export import load_into
from visionzip.families import FAMILIES, Family, family_for
from visionzip.pretrained import load_model, load_processor, read_config


def build_model(config: RunConfig) -> tuple[Any, Any]:
    """The compressed model, all frozen, and its processor.

    With a ZeRO-3 config, build `TrainingArguments` first: the weights are then sharded while they are loaded.

    Raises:
        ConfigError: no model there, no GPU for a quantised one, a budget or a model that is not supported.
    """
    section = config.model
    load = load_model
    if config.data.cache is not None and config.eval is None:  # an evaluation sees images that are in no cache
        load = partial(load_without, without=["encoder"])
    quantized = quantization_options(section)
    with as_config_error("model.path"):
        model = load(
            section.path,
            **section.source_options,
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attn_implementation,
            **quantized,
        )
        processor = load_processor(section.path, **section.source_options)
    with as_config_error("model / zip"):
        attach(model, processor, config.zip)
        if section.projector is not None:
            load_into(model, section.projector, force=section.force_projector, adapters=False)
    if section.frozen_dtype is not None:
        freeze_in_float8(model, family_for(model))
    model.config.use_cache = False
    return model, processor


def quantization_options(section: ModelSection) -> dict[str, Any]:
    """`from_pretrained` arguments that load the frozen LLM in 8 or 4 bit; the encoder, the projector and the head stay as they are.

    Raises:
        ConfigError: without a GPU, without bitsandbytes, or for a model that is not supported.
    """
    if section.quantization is None:
        return {}
    if not torch.cuda.is_available():
        raise ConfigError(
            f"model.quantization={section.quantization} needs a GPU, and there is none here; leave it out, or use "
            "trainer.deepspeed=zero3_offload where memory is short"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError("model.quantization needs bitsandbytes; pip install 'visionzip-ft[quant]'") from None
    from transformers import BitsAndBytesConfig

    try:
        kind = read_config(section.path, **section.source_options).model_type
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from error
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ConfigError(f"a {kind} model can't be compressed; supported: {', '.join(FAMILIES.names())}")
    keep = not_quantized(family)
    if section.quantization == "8bit":
        chosen = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    else:
        chosen = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, section.dtype),
            llm_int8_skip_modules=keep,
        )
    return {"quantization_config": chosen, "device_map": {"": torch.cuda.current_device()}}


def not_quantized(family: type[Family]) -> list[str]:
    """Dotted names, from the model, of all but the LLM's trunk. transformers compares them with whole names, from the first letter:
    a bare ``vision_tower`` would name nothing, and encoder and projector would be quantised."""
    frozen = [name for part, name in family.frozen.items() if part != "llm"]
    return list(dict.fromkeys([family.tower, *frozen, *family.projectors, "lm_head"]))


def master_precision(model: nn.Module) -> None:
    """Trainable weights in float32, for runs without DeepSpeed (whose optimizer keeps float32 copies of its own)."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
