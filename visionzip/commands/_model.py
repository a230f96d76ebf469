"""What the commands that look at a model share: arguments for the model and its budget, and how both are read."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

#: budget → field of ZipConfig it overrides
FIELDS = ("dominant", "contextual", "selector", "merge", "layer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model or anything that was fine-tuned: file, directory or hub id")
    parser.add_argument("--base", help="the model that a projector belongs to, where that is not the one it names")
    parser.add_argument(
        "--force",
        action="store_true",
        help="load a projector although it was trained with something else than the base",
    )
    budget = parser.add_argument_group(
        "budget",
        "default: what it was fine-tuned with; for a plain model 54 + 10 tokens, or a fifth of a small picture",
    )
    budget.add_argument("--dominant", type=tokens, help="tokens kept as they are: a number (54), or a share (0.1)")
    budget.add_argument("--contextual", type=tokens, help="tokens the others are merged into: a number, or a share")
    budget.add_argument("--selector", help="how the kept ones are chosen (default: visionzip)")
    budget.add_argument("--merge", choices=("add", "mean", "none"), help="how the others are merged (default: add)")
    budget.add_argument("--layer", type=int, help="encoder layer that is read, as in hidden_states[layer]")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: float32, bfloat16, float16 (default: as stored)"
    )


def tokens(text: str) -> int | float:
    """``54`` is a number of tokens, ``0.1`` a share of them."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise argparse.ArgumentTypeError(f"expected a number of tokens (54) or a share of them (0.1), got {text!r}")


def count(text: str) -> int:
    """A number of things of which there has to be one at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def load(arguments: argparse.Namespace, **options: Any) -> tuple[Any, Any]:
    """Model and processor, attached with the budget asked for. `options` go to ``from_pretrained``.

    A budget other than the one a projector was trained with is fine to look at, so it is attached after the projector's
    own checks.
    """
    import visionzip
    from visionzip.export.base import recognise
    from visionzip.hub import local_copy

    place = local_copy(arguments.model)
    config = None if recognise(place) is not None else usual(str(arguments.base or place))
    model, processor = visionzip.load(
        place, arguments.device, arguments.dtype, config=config, base=arguments.base, force=arguments.force, **options
    )
    asked = {name: value for name in FIELDS if (value := getattr(arguments, name)) is not None}
    if asked:
        attachment = visionzip.attached(model)
        assert attachment is not None
        if "dominant" in asked and "contextual" not in asked and attachment.config.contextual:
            asked["contextual"] = _in_proportion(asked["dominant"], attachment.config)
        config = visionzip.ZipConfig(**{**attachment.config.model_dump(), **asked})
        visionzip.attach(model, processor, config)
    return model, processor


def usual(source: str) -> Any:
    """A budget for a model that names none; None where its config has one."""
    from transformers import AutoConfig

    from visionzip.config import ZipConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is no model that transformers can load: {str(error).splitlines()[0]}") from error
    if config.__dict__.get("visionzip"):
        return None
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if isinstance(size, int) and isinstance(patch, int) and (size // patch) ** 2 >= 5 * 64:
        return ZipConfig.model_validate({})
    return ZipConfig.model_validate({"dominant": 0.16, "contextual": 0.04})


def _in_proportion(dominant: int | float, config: Any) -> int | float:
    """Contextual tokens to go with another number of dominant ones, in the proportion they had."""
    if isinstance(dominant, float) is not isinstance(config.dominant, float):
        return max(1, round(dominant * 10 / 54)) if isinstance(dominant, int) else dominant * 10 / 54
    scaled = dominant * config.contextual / config.dominant
    return scaled if isinstance(dominant, float) else max(1, round(scaled))
