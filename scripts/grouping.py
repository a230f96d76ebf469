"""What choosing patches before they are grouped would do, in numbers: why `visionzip/families/grouped.py` chooses groups.

    python -m scripts.grouping                              the embedded model's encoder, on the embedded data's images
    python -m scripts.grouping --random                     an encoder of InternVL's shape with random weights
    python -m scripts.grouping --model PATH --side 2        any model with a CLIP, SigLIP or InternViT encoder

Chosen first, the best patches lie in so many groups: each of these would be a token for the LLM, most of them with holes. Chosen
as groups, the tokens are as many as asked for and whole; the price is the attention that a free choice of patches would hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.scenes import draw_scene, make_scene
from visionzip.encoders import encoder_for
from visionzip.families.grouped import group_mean

SHARES = (0.125, 0.25, 0.5)


def scores_of(tower: Any, pixel_values: Tensor) -> Tensor:
    """``(B, N)`` scores of the patches that fill a square grid, of the layer LLaVA reads."""
    encoder = encoder_for(tower)
    features = encoder.encode(tower, pixel_values, -2)
    assert features.scores is not None
    return features.scores[:, features.cls :]


def whole_squares(scores: Tensor, side: int) -> Tensor:
    """A grid whose side is no multiple of `side` loses its last rows and columns."""
    length = round(scores.shape[1] ** 0.5)
    kept = length // side * side
    return scores.unflatten(1, (length, length))[:, :kept, :kept].flatten(1)


def measure(scores: Tensor, side: int) -> Iterator[tuple[float, float, float, float, float]]:
    """For each share of the tokens: groups touched and whole (before), attention held (before, after); of all, mean."""
    total = scores.sum(dim=1)
    groups = group_mean(scores.unsqueeze(-1), side).squeeze(-1)
    for share in SHARES:
        best = scores.topk(round(share * scores.shape[1]), dim=1).indices
        chosen = torch.zeros_like(scores).scatter(1, best, 1.0)
        filled = group_mean(chosen.unsqueeze(-1), side).squeeze(-1)
        held = (scores * chosen).sum(1) / total
        after = groups.topk(round(share * groups.shape[1]), dim=1).values.sum(1) * side**2 / total
        found = ((filled > 0).float().mean(), (filled > 1 - 1e-6).float().mean(), held.mean(), after.mean())
        yield (share, *(float(value) for value in found))


def random_tower() -> Any:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return InternVLVisionModel(InternVLVisionConfig(**small, layer_scale_init_value=1.0, initializer_range=0.2)).eval()


def make_images(size: int, count: int) -> Tensor:
    """``(count, 3, size, size)`` in [-1, 1]."""
    drawn = [draw_scene(make_scene(seed)).convert("RGB").resize((size, size)) for seed in range(count)]
    return torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in drawn]).reshape(
        count, size, size, 3
    ).permute(0, 3, 1, 2).float().div(127.5).sub(1)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path("data") / "tiny-llava"))
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--side", type=int, default=2, help="side of a group, in patches")
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args()
    if options.random:
        tower = random_tower()
    else:
        from transformers import AutoModelForImageTextToText

        tower = AutoModelForImageTextToText.from_pretrained(options.model).eval().model.vision_tower
    size = tower.config.image_size
    pixels = make_images(size if isinstance(size, int) else size[0], options.images)
    scores = torch.cat([scores_of(tower, part) for part in pixels.split(8)])
    print(
        "| budget | before: groups touched | before: groups complete | before: attention covered | after: attention covered |"
    )
    print("| --- | --- | --- | --- | --- |")
    for row in measure(whole_squares(scores, options.side), options.side):
        print("| " + " | ".join(f"{value:.1%}" for value in row) + " |")


if __name__ == "__main__":
    main()
