"""write what was trained in another format, with a model card

  visionzip export runs/demo --format merged --out runs/demo-merged
  visionzip export runs/ft-64 --format llava --out llava-v1.5-7b-visionzip-64
  visionzip export runs/demo --format onnx --budgets 16,32,64 --precision language=int8 --out runs/demo-onnx

A run directory stands for everything that the run trained: a projector, a projector with LoRA, or a whole model.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = list_formats()
    parser.epilog = "formats:\n" + "\n".join(f"  {name:<11}  {text}" for name, text in formats.items())
    parser.add_argument("source", help="a run's directory, or an export of any format: file, directory or hub id")
    parser.add_argument("--out", required=True, help="directory to write; must not exist, or be empty")
    parser.add_argument("--format", default="safetensors", help="see below (default: safetensors)")
    parser.add_argument("--base", help="the model it belongs to, if not the one it names")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the base model (never run without this option)",
    )
    parser.add_argument("--vision-tower", help="llava: the encoder's id or directory, if its sizes do not identify it")
    parser.add_argument(
        "--budgets", metavar="N,N", help="onnx: a vision graph for each of these budgets; also 54+10, all"
    )
    parser.add_argument(
        "--precision",
        help="onnx: float32 (default), float16, int8 or int4 weights; by part: vision=float32,language=int8",
    )
    parser.add_argument("--opset", type=int, help="onnx: version of ONNX's operators, if not the oldest that suffices")
    parser.add_argument(
        "--force", action="store_true", help="merge although it was trained with another base, encoder or budget"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the export that is at --out")


def list_formats() -> dict[str, str]:
    """Name → summary of each format, from the first line of its file: importing those would import torch, and --help is quick."""
    import visionzip

    found = {}
    for path in sorted((Path(visionzip.__file__).parent / "export").glob("*.py")):
        line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
        if match := re.match(r"`(\w+)`[,:] (.+)", line):
            found[match[1]] = match[2]
    return found


def run(arguments: argparse.Namespace) -> None:
    from visionzip import save
    from visionzip.inspect import format_size

    asked = {name: getattr(arguments, name) for name in ("vision_tower", "budgets", "precision", "opset")}
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    source = plain_model(arguments) if arguments.format == "onnx" else None
    out = save(
        source or arguments.source,
        arguments.out,
        arguments.format,
        base=arguments.base,
        force=arguments.force,
        trust_remote_code=arguments.trust_remote_code,
        overwrite=arguments.overwrite,
        **options,
    )
    print(f"{out}  ({arguments.format})")
    for path in sorted(Path(out).iterdir()):
        print(f"  {path.name:<28} {format_size(path.stat().st_size):>9}")


def plain_model(arguments: argparse.Namespace) -> Any:
    """The model at `source` where that is no export and no run but a model itself, compressed without training; else None."""
    import visionzip
    from visionzip.commands._model import default_config
    from visionzip.export.base import recognise, run_result
    from visionzip.hub import local_copy

    place = run_result(local_copy(arguments.source))
    if recognise(place) is not None or not (Path(place) / "config.json").is_file():
        return None
    config = default_config(str(place), arguments.trust_remote_code)
    return visionzip.load(place, "cpu", "float32", config=config, trust_remote_code=arguments.trust_remote_code)[0]
