"""Time that a run needs: counted work divided by a rate. What `train.plan` says of time.

Counted are the matrix products that can't be avoided: 2 FLOPs a parameter and token forward and 2 for the gradient of a layer's input
(2 more where the layer trains or is recomputed), causal attention, the head on supervised tokens, and one forward of the encoder
if no token cache is read. Norms, the optimizer and reading data are not counted; the rate of a whole layer includes its norms.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch

from train.config import RunConfig
from train.memory import Sizes
from train.trainable import count_parameters
from visionzip.families import family_for

SUPERVISED = 1 / 3
"""Share of a sample's tokens that are supervised, as `train.memory` has it."""
USUAL_SIZE = (480, 640)
"""Height and width of an image where the encoder has no size of its own."""
ROUNDS = 3


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample."""

    llm: float
    head: float
    projector: float
    encoder: float

    @property
    def total(self) -> float:
        return self.llm + self.head + self.projector + self.encoder


def sample_work(model: Any, config: RunConfig, sizes: Sizes, length: float) -> Work:
    """FLOPs of a sample of one image whose `length` tokens go through the LLM. `model` may be on the meta device."""
    family, extra = family_for(model), config.trainer.model_extra or {}
    trains = "llm" in config.train.parts
    again = bool(extra.get("gradient_checkpointing") or extra.get("activation_checkpointing"))
    per_token = 4.0 + 2.0 * trains + 2.0 * again
    body = count_parameters(model.get_submodule(family.llm).layers, trainable=False)
    attention = 6.0 + 2.0 * again  # 2·L²·D forward, causal, and twice that backward
    return Work(
        llm=per_token * body * length + attention * length**2 * sizes.hidden * sizes.layers,
        head=(6.0 if trains else 4.0) * sizes.hidden * sizes.vocabulary * SUPERVISED * length,
        projector=6.0
        * sum(count_parameters(model.get_submodule(name), trainable=False) for name in family.projectors)
        * sizes.visual,
        encoder=0.0 if config.data.cache is not None else encoder_work(model, family.frozen["encoder"]),
    )


def encoder_work(model: Any, tower: str) -> float:
    """FLOPs of one forward of the encoder's blocks on an image (or tile, or frame)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    vision = model.config.vision_config
    height, width = pair(getattr(vision, "image_size", None) or USUAL_SIZE)
    high, wide = pair(vision.patch_size)
    patches, size = (height // high) * (width // wide), getattr(vision, "embed_dim", None) or vision.hidden_size
    blocks = [m for m in model.get_submodule(tower).modules() if isinstance(m, GradientCheckpointingLayer)]
    return sum(2.0 * count_parameters(block, trainable=False) * patches + 4.0 * patches**2 * size for block in blocks)


def pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def measure_rate(model: Any, config: RunConfig, samples: int, length: int) -> float:
    """FLOP/s of the LLM's first layer here: forward and backward of `samples` rows of `length` tokens, the best of `ROUNDS`.

    The layer gets random weights, on the GPU if there is one. What it achieves includes its norms and activations.
    """
    from transformers import AutoModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = copy.deepcopy(model.config.get_text_config())
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 16, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    options = (
        {} if config.model.attn_implementation is None else {"attn_implementation": config.model.attn_implementation}
    )
    llm = AutoModel.from_config(text, dtype=getattr(torch, config.model.dtype), **options)
    llm = llm.to(device).requires_grad_("llm" in config.train.parts)
    rows = torch.randn(samples, length, text.hidden_size, dtype=llm.dtype, device=device, requires_grad=True)
    best = float("inf")
    for _ in range(1 + ROUNDS):
        wait(device)
        start = time.perf_counter()
        llm(inputs_embeds=rows, use_cache=False)[0].sum().backward()
        wait(device)
        best = min(best, time.perf_counter() - start)
    factor = 6.0 if "llm" in config.train.parts else 4.0
    work = factor * count_parameters(llm.layers, trainable=False) * length + 6.0 * length**2 * text.hidden_size
    return samples * work / best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def render_duration(work: Work, rate: float, gpus: int, config: RunConfig, samples: int | None) -> str:
    """Seconds of a step, and hours of the run where its number of samples is known."""
    extra = config.trainer.model_extra or {}
    each = int(extra.get("per_device_train_batch_size", 8)) * int(extra.get("gradient_accumulation_steps", 1))
    batch = config.trainer.global_batch_size or each * gpus
    per_second = gpus * rate / work.total
    shares = ", ".join(
        f"{name} {100 * value / work.total:.0f} %"
        for name, value in (
            ("LLM", work.llm),
            ("head", work.head),
            ("projector", work.projector),
            ("encoder", work.encoder),
        )
    )
    steps = int(extra.get("max_steps") or 0)
    if steps > 0:
        samples = steps * batch
    elif samples is not None:
        samples = int(samples * float(extra.get("num_train_epochs", 1)))
    whole = "" if samples is None else f"; {samples:,} samples take {samples / per_second / 3600:.2f} hours"
    return (
        f"{work.total / 1e12:.3f} TFLOP per sample ({shares}); at {rate / 1e12:.3g} TFLOP/s: {per_second:.2f} samples/s, "
        f"{batch / per_second:.2f} s per step of {batch}{whole}"
    )
