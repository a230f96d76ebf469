"""Memory that a run needs of one GPU, for every ZeRO stage.

Sizes come from the model's config alone; no weights are read. Where the model is not on this machine, a `model.json` (its
`config.json`) beside the run's config is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from train.config import ConfigError, RunConfig
from train.trainable import linear_layers, modules_of
from visionzip.budgets import at_budget, ladder, weights
from visionzip.families import family_for
from visionzip.pretrained import read_config

GIB = 1 << 30
USABLE = 0.9
"""Share of a GPU's memory that a plan may fill: long samples and the allocator's fragments come on top of the averages here."""

CONTEXT = 1.2 * GIB
"""CUDA context, NCCL's buffers and the allocator's slack."""

TEXT = 300
"""Average tokens of text in a sample of LLaVA's 665k mix; `visionzip data` counts those of other data."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model: parameters; `hidden`, `inner`, `layers`, `kv` (share of key/value heads), `vocabulary` of its LLM; visual tokens
    of an image."""

    total: int
    trained: int
    largest: int
    hidden: int
    inner: int
    layers: int
    kv: float
    vocabulary: int
    visual: int


@dataclass(frozen=True)
class Plan:
    """A way to run it. `stage`: ZeRO 0 to 3; `device`: samples per GPU at once; `weight_bytes`: of a frozen weight."""

    name: str
    stage: int
    device: int
    weight_bytes: float
    offload: bool = False
    offload_weights: bool = False
    checkpointing: bool = False


def estimate_memory(plan: Plan, sizes: Sizes, gpus: int, length: int, llm_trains: bool = False) -> dict[str, float]:
    """Bytes on one GPU by what they are for: weights, gradients, optimizer, activations, other."""
    shards = gpus if plan.stage >= 3 else 1
    weights = sizes.total * plan.weight_bytes / shards
    if plan.stage >= 3:  # the layer being computed and the one fetched ahead are whole
        weights = (0.0 if plan.offload_weights else weights) + 2 * sizes.largest * plan.weight_bytes
    # In bf16 and accumulated in float32. What is offloaded leaves the GPU bucket by bucket.
    gradients = 0.0 if plan.offload else 6 * sizes.trained / (gpus if plan.stage >= 2 else 1)
    optimizer = 0.0 if plan.offload else 12 * sizes.trained / (gpus if plan.stage >= 1 else 1)
    tokens = plan.device * length
    layer = activation_bytes(sizes, llm_trains)
    if plan.checkpointing:
        activations = tokens * (2 * sizes.hidden * sizes.layers + layer)
    else:
        activations = tokens * layer * sizes.layers
    supervised = tokens / 3
    logits = min(supervised * sizes.vocabulary * 10, 512 * sizes.vocabulary * 10)  # taken in chunks
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "other": logits + CONTEXT,
    }


def activation_bytes(sizes: Sizes, llm_trains: bool = False) -> float:
    """Bytes that one layer keeps of one token for the backward pass, in bf16.

    Frozen linear layers keep nothing. The two norms keep their input and its normalised form in float32 (16 h), attention its
    queries, keys, values and output and the rotary products, the gated MLP its two branches and their product.
    """
    attention = (2 + 2 * sizes.kv) * 2 * sizes.hidden + (1 + sizes.kv) * 2 * sizes.hidden
    frozen = 16 * sizes.hidden + attention + 6 * sizes.inner
    return frozen + (2 * (4 * sizes.hidden + sizes.inner) if llm_trains else 0)  # inputs of linear layers that train


def measure_model(model: Any, config: RunConfig) -> Sizes:
    """Counted on a model without weights (meta device)."""
    text = model.config.get_text_config()
    trained = sum(p.numel() for part in config.train.parts for name in modules_of(model, part)
                  for p in model.get_submodule(name).parameters())  # fmt: skip
    if config.train.lora is not None:
        layers = (model.get_submodule(name) for name in linear_layers(model, config.train.lora))
        trained += sum(config.train.lora.r * (layer.in_features + layer.out_features) for layer in layers)
    blocks = [m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "EncoderLayer"))]
    return Sizes(
        total=sum(p.numel() for p in model.parameters()),
        trained=trained,
        largest=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        layers=text.num_hidden_layers,
        kv=getattr(text, "num_key_value_heads", text.num_attention_heads) / text.num_attention_heads,
        vocabulary=text.vocab_size,
        visual=visual_tokens(model, config),
    )


def visual_tokens(model: Any, config: RunConfig) -> int:
    """Of one image (or tile, or frame), compressed; their mean where there are several budgets; of 640 × 480 pixels where the
    encoder has no size of its own."""
    family, zip_config = family_for(model), config.zip
    each = [family.usual_tokens(at_budget(zip_config, budget)) for budget in ladder(zip_config)]
    return round(sum(share * tokens for share, tokens in zip(weights(zip_config), each, strict=True)))


def model_without_weights(config: RunConfig, beside: Path) -> Any:
    """Raises ConfigError where no model config can be found."""
    from transformers import AutoModelForImageTextToText

    found = beside / "model.json"
    try:
        local = Path(config.model.path).is_dir()
        shape = read_config(
            found if found.is_file() and not local else config.model.path, **config.model.source_options
        )
    except ValueError as error:
        raise ConfigError(
            f"model.path: no config of {config.model.path} here; put its config.json beside the run's "
            f"config as {found}, or set model.path to a directory"
        ) from error
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(shape, trust_remote_code=config.model.trust_remote_code)


def list_plans(config: RunConfig) -> list[Plan]:
    """The config as it is, then ways to need less memory, the least change first, each named by its overrides."""
    extra = config.trainer.model_extra or {}
    stage = config.trainer.deepspeed
    bytes_ = {None: 4.0 if config.model.dtype == "float32" else 2.0, "8bit": 1.05, "4bit": 0.6}[
        config.model.quantization
    ]
    if config.model.frozen_dtype is not None:
        bytes_ = 1.05
    checkpointing = bool(extra.get("gradient_checkpointing") or extra.get("activation_checkpointing"))
    number = int(stage[4]) if stage.startswith("zero") else 0
    here = Plan(
        "as configured", number, int(extra.get("per_device_train_batch_size", 8)), bytes_, "offload" in stage,
        stage.startswith("zero3_"), checkpointing,
    )  # fmt: skip
    sizes = [here.device]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    batch = lambda size: f"trainer.per_device_train_batch_size={size}"  # noqa: E731
    ways = [here, *(replace(here, name=batch(size), device=size) for size in sizes[1:])]
    whole = config.model.quantization is None and config.model.frozen_dtype is None
    if whole and number < 3:
        ways += [
            replace(here, name=f"trainer.deepspeed=zero3 {batch(size)}", stage=3, device=size, offload=False)
            for size in sizes
        ]
    last = replace(ways[-1], device=1, checkpointing=True)
    least = f"{batch(1)} trainer.gradient_checkpointing=true"
    ways.append(replace(last, name=f"trainer.deepspeed=zero3 {least}" if last.stage == 3 and number < 3 else least))
    if whole and not here.offload_weights:
        offloaded = replace(last, stage=3, offload=True, offload_weights=True)
        ways.append(replace(offloaded, name=f"trainer.deepspeed=zero3_offload {least}"))
    if whole and "llm" not in config.train.parts:
        quantized = replace(last, stage=2, weight_bytes=0.6, offload=False, offload_weights=False)
        ways.append(replace(quantized, name=f"model.quantization=4bit trainer.deepspeed=zero2 {least}"))
    return ways


def render_plans(ways: list[Plan], sizes: Sizes, gpus: int, room: float, length: int, llm_trains: bool) -> str:
    """A Markdown table in GiB, then what to do. A way fits where it leaves a tenth of `room` (GiB) free."""
    usable = USABLE * room
    head = [
        "",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "other",
        "total",
        f"fits in {usable:.1f} of {room:g} GiB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    fitting = None
    for way in ways:
        parts = estimate_memory(way, sizes, gpus, length, llm_trains)
        total = sum(parts.values()) / GIB
        fits = total <= usable
        fitting = fitting or (way if fits else None)
        cells = [way.name, *(f"{value / GIB:.1f}" for value in parts.values()), f"{total:.1f}", "yes" if fits else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    advice = (
        "Nothing here fits: take more or larger GPUs, or a smaller model."
        if fitting is None
        else "It fits as it is."
        if fitting is ways[0]
        else f"It does not fit as configured; the least change that does: {fitting.name}"
    )
    return "\n".join([*lines, "", advice])
