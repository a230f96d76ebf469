"""write what was trained in another format, with a model card

  visionzip export runs/demo/projector --format merged --out runs/demo/merged
  visionzip export runs/ft-64/projector --format llava --out llava-v1.5-7b-visionzip-64

formats:
  safetensors  the projector alone, float32 (default)
  llava        mm_projector.bin and config.json for LLaVA's own loader, float16
  merged       a whole model directory for from_pretrained that compresses by itself
  peft         an adapter for PeftModel.from_pretrained
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="an export of any format: file, directory, or id on the hub")
    parser.add_argument("--out", required=True, help="directory to write; must not exist, or be empty")
    parser.add_argument("--format", default="safetensors", help="see above (default: safetensors)")
    parser.add_argument("--base", help="the model it belongs to, where that is not the one it names")
    parser.add_argument("--vision-tower", help="llava: the encoder's id or directory, where its sizes do not tell")
    parser.add_argument(
        "--force", action="store_true", help="although it was trained with something else than the base"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the export that is at --out")


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
        overwrite=arguments.overwrite,
        **options,
    )
    print(f"{out}  ({arguments.format})")
    for path in sorted(Path(out).iterdir()):
        print(f"  {path.name:<28} {format_size(path.stat().st_size):>9}")
