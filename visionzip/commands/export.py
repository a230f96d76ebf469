"""write what was trained in another format, with a model card

  visionzip export runs/demo --format merged --out runs/demo-merged
  visionzip export runs/ft-64 --format llava --out llava-v1.5-7b-visionzip-64

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
        help="run Python code that comes with the base model (default: never; nothing asks)",
    )
    parser.add_argument("--vision-tower", help="llava: the encoder's id or directory, if its sizes do not identify it")
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

    options: dict[str, Any] = {}
    if arguments.vision_tower:
        options["vision_tower"] = arguments.vision_tower
    out = save(
        arguments.source,
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
