"""What one prompt with one image costs at a cell's budget: counted, not timed, so that it is the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image

from train.build import build_model
from train.config import RunConfig
from visionzip import attached
from visionzip.attach import unwrap
from visionzip.benchmark import cache_bytes, count_flops
from visionzip.images import prepare_image
from visionzip.inputs import batch_prompts, prompt_inputs, to_model
from visionzip.intercept import Interceptions
from visionzip.prompts import question, usual_template

QUESTION = "Describe the picture."


def count_costs(config: RunConfig, path: str) -> int:
    """Write `costs_of` the model and budget of `config` to `path`, as JSON; returns the exit code."""
    model, processor = build_model(config)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(costs_of(model, processor)) + "\n")
    return 0


@torch.no_grad()
def costs_of(model: Any, processor: Any) -> dict[str, float]:
    """Of a grey image and a short question:

    - ``visual_tokens``: that enter the LLM, and ``visual_tokens_mean``: averaged over its layers;
    - ``flops``: of encoder, projector and prefill, multiplications and additions, and ``encode_flops``: before the LLM;
    - ``cache_bytes``: keys and values of the visual tokens.
    """
    attachment = attached(model)
    assert attachment is not None
    base = unwrap(model)
    image = prepare_image(Image.new("RGB", (336, 336), "grey"), processor, attachment.config.pad_images)
    row = prompt_inputs(usual_template(processor), [question(QUESTION)], [image])
    inputs = to_model(model, batch_prompts(processor, [row]))
    length = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"] == base.config.image_token_id).sum())
    seen: list[int] = []
    layers = base.get_submodule(attachment.family.llm).layers
    with Interceptions() as put:
        for layer in layers:
            put.after_forward(layer, lambda module, args, output: seen.append(args[0].shape[1]))
        cache = model(**inputs, use_cache=True).past_key_values
    flops, encode_flops = count_flops(model, inputs)
    return {
        "visual_tokens": visual,
        "visual_tokens_mean": mean(tokens - length + visual for tokens in seen),
        "flops": flops,
        "encode_flops": encode_flops,
        "cache_bytes": cache_bytes(cache) * visual / length,
    }
