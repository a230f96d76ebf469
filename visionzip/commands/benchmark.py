"""measure time, memory and work of a model with all visual tokens and with few

  visionzip benchmark data/tiny-llava --budgets all,16,8
  visionzip benchmark llava-hf/llava-1.5-7b-hf --budgets all,192,128,64 --batches 1,8 --turns 3 --json bench.json --plot bench.png
  visionzip benchmark llava-hf/llava-1.5-13b-hf --quantize 4

Prefill, time to first token, decoding, peak memory, keys and values, FLOPs. Turns after the first reuse the cache, as a chat does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from visionzip.argument_types import at_least
from visionzip.commands import _model
from visionzip.commands._outputs import check_outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    parser.add_argument(
        "--budgets", help="all, 64, 54+10 or 0.1, separated by commas (default: all and the model's own)"
    )
    parser.add_argument("--batches", default="1", help="batch sizes, separated by commas (default: 1)")
    parser.add_argument("--turns", type=at_least(1), default=1, help="of the conversation (default: 1)")
    parser.add_argument("--new-tokens", type=at_least(1), default=32, help="length of each answer (default: 32)")
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        default=3,
        help="timed runs, of which the median is reported (default: 3), after one warm-up run",
    )
    parser.add_argument("--image", "--picture", help="default: 640 × 480 pixels of a gradient")
    parser.add_argument(
        "--quantize", type=int, choices=(8, 4), help="load the weights in 8 or 4 bit (bitsandbytes, GPU)"
    )
    parser.add_argument("--json", help="write all numbers to this JSON file")
    parser.add_argument("--plot", help="write a plot to this PNG file")
    parser.add_argument("--theme", choices=("light", "dark"), default="light", help="theme of the plot")


def run(arguments: argparse.Namespace) -> None:
    from visionzip import attached
    from visionzip import benchmark as bench
    from visionzip.analysis import style
    from visionzip.budgets import parse_budgets
    from visionzip.images import decode_image

    if arguments.budgets is not None:
        parse_budgets(
            arguments.budgets
        )  # a mistake is found before a model is loaded; the model may have a split of its own
    try:
        batches = [int(part) for part in arguments.batches.split(",")]
    except ValueError as error:
        raise ValueError(f"--batches {arguments.batches!r} is not understood; expected numbers such as 1,8") from error
    image = decode_image(arguments.image) if arguments.image else gradient()
    check_outputs(arguments)
    for file in filter(None, (arguments.json, arguments.plot)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    model, processor = _model.load(arguments, **quantized(arguments))
    attachment = attached(model)
    assert attachment is not None
    own = attachment.config
    budgets = parse_budgets(arguments.budgets, own) if arguments.budgets is not None else [None, own]
    rows = bench.benchmark(
        model, processor, image, budgets=budgets, batches=batches, turns=arguments.turns,
        new_tokens=arguments.new_tokens, repeats=arguments.repeats,
        report=lambda doing: print(f"  {doing}", file=sys.stderr, flush=True),
    )  # fmt: skip
    found = bench.facts(rows, model, name=arguments.model, quantize=arguments.quantize, new_tokens=arguments.new_tokens,
                        image=list(image.size))  # fmt: skip
    where = f"{arguments.model} on {found['device']}, {found['dtype']}" + (
        f", {arguments.quantize} bit" if arguments.quantize else ""
    )
    print(f"{where}\n\n{bench.render_rows(rows)}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    if arguments.plot:
        with style.style(arguments.theme):
            style.save_figure(bench.draw_rows(rows, where), arguments.plot)


def quantized(arguments: argparse.Namespace) -> dict:
    """What ``from_pretrained`` needs for 8 or 4 bit.

    Raises:
        ValueError: without a GPU or bitsandbytes.
    """
    if arguments.quantize is None:
        return {}
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise ValueError(
            f"--quantize {arguments.quantize} needs a GPU, and there is none; leave it out to measure on the CPU"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--quantize needs bitsandbytes: pip install 'visionzip-ft[quant]'")
    config = BitsAndBytesConfig(load_in_4bit=arguments.quantize == 4, load_in_8bit=arguments.quantize == 8)
    return {"quantization_config": config}


def gradient() -> Any:
    """An image that needs no file."""
    from PIL import Image

    return Image.linear_gradient("L").resize((640, 480)).convert("RGB")
