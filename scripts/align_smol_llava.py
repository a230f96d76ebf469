"""Give the projector of a small LLaVA its start: patches of a thing become the embeddings of the words for it and for its place.

    python -m scripts.align_smol_llava --model MODEL --data DATA --out data/smol-llava/start.safetensors

Minutes instead of hours: no language model is run. For scenes of `data.stamps` it is known what stands where, so each patch has a
target: the mean embedding of the words of its thing's name, plus that of its place; patches of the background have the word
"background". `configs/smol-llava/base.yaml` goes on from there, through the language model.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, LlavaForConditionalGeneration

from data.stamp_scenes import CATALOGUE, QUADRANTS, StampScene
from data.stamps import scene_of
from visionzip.encoders import encoder_for

PLACE, BACKGROUND = 0.7, 0.5  # weights beside the name's


class Words:
    """Targets of patches: one for each thing at each place, the background last."""

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: Any) -> None:
        table = model.get_input_embeddings().weight.detach().float()

        def embedding(words: str) -> Tensor:
            return table[tokenizer(f" {words}", add_special_tokens=False)["input_ids"]].mean(0)

        self.names = [thing.name for thing in CATALOGUE if thing.seen]
        places = [PLACE * embedding(place) for place in QUADRANTS]
        rows = [embedding(name) + place for name in self.names for place in places]
        self.targets = torch.stack([*rows, BACKGROUND * embedding("background")])  # (names · 4 + 1, hidden)

    def label(self, scene: StampScene, grid: int) -> Tensor:
        """``(grid · grid,)``: for each patch its row in `targets`, or -1 at the edge of a thing, where it may be either."""
        centres = (torch.arange(grid) + 0.5) / grid
        labels = torch.full((grid, grid), len(self.targets) - 1)
        for placed in scene.things:
            distance = torch.hypot((centres - placed.x)[None, :], (centres - placed.y)[:, None]) / placed.size
            labels[distance < 0.6] = -1
            labels[distance < 0.25] = 4 * self.names.index(placed.thing.name) + placed.quadrant
        return labels.flatten()


@torch.no_grad()
def encode(model: LlavaForConditionalGeneration, processor: Any, files: list[Path], batch: int = 16) -> Tensor:
    """``(B, patches, D)`` bfloat16, of the layer that the model reads."""
    tower, found = model.model.vision_tower, []
    for start in range(0, len(files), batch):
        images = [Image.open(path).convert("RGB") for path in files[start : start + batch]]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(tower.dtype)
        features = encoder_for(tower).encode(tower, pixels, model.config.vision_feature_layer, scores=False)
        found.append(features.hidden_states[:, 1:].to(torch.bfloat16))
        if start // batch % 10 == 0:
            print(f"encoding {start + len(images)}/{len(files)}", flush=True)
    return torch.cat(found)


def train(
    projector: torch.nn.Module, features: Tensor, labels: Tensor, targets: Tensor, steps: int, lr: float
) -> float:
    """Least squares over patches, AdamW with a cosine; returns the share of held-out patches whose nearest target is theirs."""
    generator = torch.Generator().manual_seed(0)
    known = labels >= 0
    background = len(targets) - 1
    thin = (labels != background) | (
        torch.rand(labels.shape, generator=generator) < 0.15
    )  # most patches are background
    rows = (known & thin).flatten().nonzero().squeeze(1)
    flat, labels = features.flatten(0, 1), labels.flatten()
    held_out = rows >= int(0.95 * len(labels))
    training, rest = rows[~held_out], rows[held_out]
    optimizer = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    size = targets.shape[1]
    for step in range(steps):
        chosen = training[torch.randint(len(training), (512,), generator=generator)]
        made = projector(flat[chosen].float())
        distances = torch.cdist(made, targets).square() / size
        loss = F.mse_loss(made, targets[labels[chosen]]) + 0.01 * F.cross_entropy(-50 * distances, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 200 == 0 or step == steps - 1:
            with torch.no_grad():
                nearest = torch.cdist(projector(flat[rest].float()), targets).argmin(1)
            right = (nearest == labels[rest]).float().mean().item()
            things = labels[rest] != background
            of_things = (nearest == labels[rest])[things].float().mean().item()
            names = (nearest // 4 == labels[rest] // 4)[things].float().mean().item()
            print(
                f"{step} loss {loss.item():.5f} right {right:.3f}, of things {of_things:.3f}, names {names:.3f}",
                flush=True,
            )
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.align_smol_llava", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", required=True, help="a directory of scripts.make_smol_llava --untrained")
    parser.add_argument("--data", type=Path, required=True, help="a folder of data.commands.stamps, seed 0")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file of the projector's four tensors")
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(arguments.model)
    words = Words(model, processor.tokenizer)
    model.model.vision_tower.to(torch.bfloat16)
    files = [arguments.data / "images" / "train" / f"{index:06d}.jpg" for index in range(arguments.scenes)]
    features = encode(model, processor, files)
    grid = round(features.shape[1] ** 0.5)
    labels = torch.stack([words.label(scene_of("train", 0, index), grid) for index in range(arguments.scenes)])
    projector = model.model.multi_modal_projector
    train(projector, features, labels, words.targets, arguments.steps, arguments.lr)
    weights = {f"model.multi_modal_projector.{name}": value for name, value in projector.state_dict().items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(arguments.out), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
