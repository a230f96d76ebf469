"""On the device at hand: the golden cases of the authors' code, and the fast way's loss and gradient beside the plain one's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from scripts.benchmarks import measure
from scripts.benchmarks.presets import PRESETS
from scripts.benchmarks.train import PARTS, PLAIN, Bench, Way, compare
from visionzip.compress import compress
from visionzip.encoders import encoder_for

GOLDEN = Path(__file__).parents[2] / "tests" / "reference"
NEAR = 1e-5


@torch.no_grad()
def golden(device: torch.device) -> dict[str, Any]:
    """Every `clip_*` case in float32: the same places, tokens within 1e-5 on a CPU and 1e-4 where other kernels add in another order."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    within = NEAR if device.type == "cpu" else 10 * NEAR
    rows, passed = [], True
    for place in sorted(GOLDEN.glob("clip_*")):
        case = json.loads((place / "case.json").read_text())
        expected = load_file(place / "expected.safetensors")
        tower = CLIPVisionModel.from_pretrained(place, dtype=torch.float32).to(device).eval()
        features = encoder_for(tower).encode(tower, expected["pixel_values"].to(device), case["layer"])
        found = compress(features, case["dominant"], case["contextual"])
        same = torch.equal(found.kept.cpu(), expected["kept_indices"].long())
        off = (found.tokens.cpu() - expected["tokens"]).abs().max().item()
        passed = passed and same and off < within
        rows.append([place.name, "same" if same else "DIFFERENT", f"{off:.1e}"])
    return {"passed": passed and bool(rows), "headers": ["golden case", "places", "tokens off by"], "rows": rows}


def gradients(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, Any]:
    """Relative error of loss and projector gradient. In float32 beside the plain way: under 1e-5. In bfloat16 beside plain float32:
    no more than half as much again as the plain way's own rounding."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reference = Bench(PRESETS["tiny"], device)
    ways: dict[str, Way] = {
        "plain": replace(PLAIN, encoder="cache"),
        **{f"fast, {name}": way for name, way in PARTS.items() if device.type == "cuda" or not way.compiled},
    }
    ways["fast"] = Way("cache")
    rows, passed = [], True
    for dtype in dtypes:
        bench = reference
        if dtype != torch.float32:
            reference.step(ways["plain"])
            bench = Bench(replace(PRESETS["tiny"], dtype=dtype), device)
            bench.model.load_state_dict(reference.model.state_dict())
            bench.pictures.stored = reference.pictures.stored.to(dtype)
            ways.pop("fast, torch.compile", None)  # exact in float32 is what counts, and compiling takes half a minute
        found = compare(bench, ways, reference.gradients if dtype != torch.float32 else None)
        allowed = NEAR if dtype == torch.float32 else 1.5 * found["plain"]["gradient_difference"] + 1e-3
        for name, entry in found.items():
            if name == "fast, without the cache" and dtype != torch.float32:
                continue  # its encoder rounds too, and may then choose other patches
            good = entry["gradient_difference"] <= allowed and (
                dtype != torch.float32 or entry["loss_difference"] <= NEAR
            )
            passed = passed and good
            rows.append(
                [
                    str(dtype)[6:],
                    name,
                    f"{entry['loss_difference']:.1e}",
                    f"{entry['gradient_difference']:.1e}",
                    "yes" if good else "NO",
                ]
            )
    return {"passed": passed, "headers": ["dtype", "way", "loss off by", "gradient off by", "exact"], "rows": rows}


def show(result: dict[str, Any]) -> str:
    return measure.table(result["headers"], result["rows"])
