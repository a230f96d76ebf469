"""Every family trains from the token cache as it does from pixels: images, several of them, videos, and rows of text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data.cache.build import fill
from data.cache.reader import VISUAL, VISUAL_VIDEO, CachedTokens
from data.dataset import build_dataset
from data.sample import Rejection
from tests.data import kit
from tests.families.case import Case, cases, make_image
from train.cached import read_from_cache
from train.loss import summed_loss
from visionzip import attach, attached

NEAR = 1e-5


def records(case: Case, folder) -> list[dict[str, Any]]:
    """One image, none, two, and a video where the family takes videos."""
    for number, size in enumerate([*case.sizes, case.sizes[0]][:3]):
        make_image(number, size).save(folder / f"{number}.png")
    two = [{"from": "human", "value": "<image> is this <image> a square"}, {"from": "gpt", "value": "no"}]
    rows = [
        kit.record(0, "0.png", answer="a red circle"),
        kit.record(1, answer="yes"),
        {"id": "two", "image": ["1.png", "2.png"], "conversations": two},
    ]
    if case.frames:
        frames = [f"frame{number}.png" for number in range(case.frames)]
        for number, name in enumerate(frames):
            make_image(10 + number, case.sizes[0]).save(folder / name)
        said = [{"from": "human", "value": "<video>\nwhat is this"}, {"from": "gpt", "value": "two"}]
        rows.append({"id": "video", "video": [frames], "conversations": said})
    return rows


def loss_and_gradient(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    labels = batch.pop("labels")
    model.zero_grad()
    loss = summed_loss(model, model.lm_head, batch, labels)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_losses_and_gradients_are_those_from_pixels(case, tmp_path):
    model, processor = case.model().requires_grad_(False), case.processor()
    attachment = attached(attach(model, processor, case.budget))
    for name in attachment.projector_names:
        model.get_submodule(name).requires_grad_(True)
    path = kit.write_json(tmp_path / "a.json", records(case, tmp_path))
    data = kit.data_config(tmp_path, path, max_length=16384, frames=max(case.frames, 1))
    folder = tmp_path / "tokens"
    folder.mkdir()
    _, rejected = fill(
        folder, attachment, processor, data, device=torch.device("cpu"), dtype=torch.float32, batch=2, workers=0
    )
    assert rejected == []
    pixels = build_dataset(data, processor, 0)
    cached = build_dataset(data, processor, 0, images=CachedTokens(folder, data.frames))
    found = {}
    for name, dataset in (("pixels", pixels), ("cache", cached)):
        items = [dataset[index] for index in range(len(dataset))]
        assert not any(isinstance(item, Rejection) for item in items), items
        batch, text = dataset.collator()(items), dataset.collator()([dataset[1]])
        if name == "cache":
            assert not any(key.startswith("pixel_values") for key in batch)
            assert len(batch[VISUAL]) >= 3  # a tile is an image to some
            assert len(batch.get(VISUAL_VIDEO, [])) == bool(case.frames)
            read_from_cache(model)
            model.get_submodule(attachment.family.frozen["encoder"]).register_forward_pre_hook(fails)
        found[name] = [*loss_and_gradient(model, batch), *loss_and_gradient(model, text)]
    for name, a, b in zip(
        ("loss", "gradient", "loss of text", "gradient of text"), found["pixels"], found["cache"], strict=True
    ):
        assert (a - b).norm() <= NEAR * b.norm(), name
    assert found["pixels"][1].norm() > 0


def fails(module, args):
    raise AssertionError("the encoder ran")
