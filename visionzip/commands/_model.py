"""What the commands that load a model share: their arguments for the model and its budget, and how it is loaded."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

#: arguments that change a field of ZipConfig
FIELDS = ("dominant", "contextual", "selector", "merge", "layer", "positions")


def add_arguments(parser: argparse.ArgumentParser, *, model: str | None = None) -> None:
    """`model`: nargs of the model, for a command that can do without (``"?"``)."""
    parser.add_argument(
        "model", nargs=model, help="a model, or anything that was fine-tuned: file, directory or hub id"
    )
    parser.add_argument("--base", help="the model that a projector belongs to, if not the one it names")
    parser.add_argument("--force", action="store_true", help="load a projector although it was trained on another base")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model (never run without this option)",
    )
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: float32, bfloat16, float16 (default: as stored)"
    )
    budget = parser.add_argument_group(
        "budget", "default: what was fine-tuned with; for a plain model 54+10 tokens, or a fifth of a small image"
    )
    budget.add_argument("--budget", metavar="N", help="visual tokens per image: 64, 54+10 or a share (0.1)")
    budget.add_argument("--dominant", type=tokens, help="tokens kept as they are: a number (54) or a share (0.1)")
    budget.add_argument("--contextual", type=tokens, help="tokens that the rest is merged into: a number or a share")
    names = registered_names("selector")
    budget.add_argument(
        "--selector",
        choices=names,
        metavar="NAME",
        help=f"how dominant tokens are chosen: {', '.join(names)} (default: visionzip)",
    )
    merges = registered_names("merge")
    budget.add_argument(
        "--merge", choices=merges, metavar="NAME", help=f"how the rest is merged: {', '.join(merges)} (default: add)"
    )
    budget.add_argument("--layer", type=int, help="encoder layer that is read, as in hidden_states[layer]")
    budget.add_argument(
        "--positions",
        choices=("compact", "original"),
        help="positions of kept tokens in the LLM: consecutive, or those of the full prompt (LLaVA-1.5) (default: compact)",
    )


def registered_names(kind: str) -> list[str]:
    """Names of the selectors (``selector``) or merges, ascending, read from their files: importing those would import torch, and
    --help is quick."""
    import visionzip

    found = []
    for path in (Path(visionzip.__file__).parent / f"{kind}s").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for call in getattr(node, "decorator_list", ()):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == kind:
                    found.append(ast.literal_eval(call.args[0]))
    return sorted(found)


def tokens(text: str) -> int | float:
    """``54`` is a number of tokens, ``0.1`` a share of them."""
    from visionzip.budgets import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def load(arguments: argparse.Namespace, **options: Any) -> tuple[Any, Any]:
    """Model and processor, attached with the requested budget. `options` go to ``from_pretrained``.

    A projector may be inspected under another budget than it was trained with, so that is attached after the projector's
    own checks.

    Raises:
        ValueError: for a model that can't be loaded, or a budget it can't have.
    """
    import visionzip
    from visionzip.export.base import recognise
    from visionzip.hub import local_copy
    from visionzip.switch import warn_untrained

    if arguments.budget and (arguments.dominant is not None or arguments.contextual is not None):
        raise ValueError("--budget sets dominant and contextual tokens; leave out --dominant and --contextual")
    place = local_copy(arguments.model)
    trust = arguments.trust_remote_code
    config = None if recognise(place) is not None else default_config(str(arguments.base or place), trust)
    model, processor = visionzip.load(
        place,
        arguments.device,
        arguments.dtype,
        config=config,
        base=arguments.base,
        force=arguments.force,
        trust_remote_code=trust,
        **options,
    )
    attachment = visionzip.attached(model)
    assert attachment is not None
    changed = with_arguments(attachment.config, arguments)
    if changed != attachment.config:
        visionzip.attach(model, processor, changed)
    current = visionzip.attached(model)
    assert current is not None
    warn_untrained(current)
    return model, processor


def with_arguments(config: Any, arguments: argparse.Namespace) -> Any:
    """`config` (ZipConfig) with what the command line says.

    Raises:
        ValueError: for a budget that no encoder could meet.
    """
    from visionzip.budgets import contextual_for, parse_budget

    asked = {name: value for name in FIELDS if (value := getattr(arguments, name)) is not None}
    if "dominant" in asked and "contextual" not in asked:
        asked["contextual"] = contextual_for(asked["dominant"], config)
    if arguments.budget:
        budget = parse_budget(arguments.budget, config)
        if budget is None:
            raise ValueError(
                f"--budget {arguments.budget}: this command needs a compressed model; give a number or share of tokens"
            )
        asked |= {"dominant": budget.dominant, "contextual": budget.contextual}
    return type(config)(**{**config.model_dump(), **asked})


def default_config(source: str, trust_remote_code: bool = False) -> Any:
    """A ZipConfig for a model whose config names none; None where it does.

    Raises:
        ValueError: when transformers can't load the config.
    """
    from visionzip.budgets import suitable_budget
    from visionzip.pretrained import read_config

    config = read_config(source, trust_remote_code=trust_remote_code)
    if config.__dict__.get("visionzip"):
        return None
    vision = getattr(config, "vision_config", None)
    return suitable_budget(getattr(vision, "image_size", None), getattr(vision, "patch_size", None))
