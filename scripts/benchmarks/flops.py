"""Arithmetic of a training step, for utilisation and bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scripts.benchmarks.presets import Preset, parameters
from visionzip.encoders import encoder_for


@dataclass(frozen=True)
class Work:
    """What one step has to do. `real` tokens its samples have, `tokens` of them the LLM must see (not a prefix computed once),
    `padded` those that go through it, with padding; `squares` is the sum of squared lengths."""

    samples: int
    real: int
    tokens: int
    padded: int
    supervised: int
    squares: int
    pictures: int


def step_flops(model: Any, preset: Preset, work: Work) -> float:
    """FLOPs that a step can't do without: nothing recomputed, no padding, no weight gradient of what is frozen.

    A frozen layer takes 2 a parameter and token forward and 2 for the gradient of its input. Causal attention takes 2·L²·D a
    layer forward and twice that backward. The projector also has weight gradients; the encoder has no backward.
    """
    llm, text = model.model.language_model, preset.text
    body = parameters(llm.layers)
    flops = 4.0 * body * work.tokens
    flops += 6.0 * work.squares * text["hidden_size"] * text["num_hidden_layers"]
    flops += 4.0 * text["hidden_size"] * text["vocab_size"] * work.supervised
    flops += 6.0 * parameters(model.model.multi_modal_projector) * preset.kept * work.samples
    return flops + work.pictures * encoder_flops(model.model.vision_tower)


def encoder_flops(tower: Any) -> float:
    """Matrix products of one image's (or tile's) forward, to the layer that is read: the one before the last."""
    tokens, width = encoder_for(tower).tokens(tower), tower.config.hidden_size
    layers = tower.config.num_hidden_layers - 1
    one = parameters(tower.encoder.layers[0])
    return layers * (2.0 * one * tokens + 4.0 * tokens**2 * width)
