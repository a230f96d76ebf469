"""Mini-Gemini, on a small stand-in with the members and the data flow of the authors' class, which transformers 5 can't import.

What this can't show: that published weights load into such a class, and what accuracy they keep.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from tests.families import slow
from tests.tiny import tiny_processor
from visionzip import ZipConfig, attach, attached, detach, visionzip
from visionzip.export import load_into, save_projector

MARKER = -200
SIDE, SQUARE = 6, 4  # patches along a side, and pixels of the detailed map along a side of each patch's square
BUDGET = ZipConfig(dominant=7, contextual=3)
PROJECTOR = "model.mm_projector"


class MGMConfig(LlamaConfig):
    model_type = "mgm"


class ClipTower(nn.Module):
    """CLIP's patches of one layer."""

    select_layer = -2

    def __init__(self) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=8 * SIDE,
            patch_size=8, initializer_range=0.5,
        )  # fmt: skip
        self.vision_tower = CLIPVisionModel(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.vision_tower(images, output_hidden_states=True).hidden_states[self.select_layer][:, 1:]


class Inner(LlamaModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower = ClipTower()
        self.vision_tower_aux = nn.Conv2d(3, 12, kernel_size=4, stride=4)
        self.mm_projector = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48))
        self.vlm_uni_query_projector = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))
        self.vlm_uni_aux_projector = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 32))
        self.vlm_uni_val_projector = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 32))


class MGM(LlamaForCausalLM):
    config_class = MGMConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Inner(config)

    def get_vision_tower(self) -> Any:
        return self.model.vision_tower

    def get_vision_tower_aux(self) -> Any:
        return self.model.vision_tower_aux

    def unified_resampler(self, images: Tensor, images_aux: Tensor) -> tuple[Tensor, Tensor]:
        """Each token asks the pixels of its own square of the detailed map."""
        inner, mined = self.model, torch.zeros_like(images)
        for token in range(SIDE * SIDE):
            row, column = token // SIDE * SQUARE, token % SIDE * SQUARE
            square = images_aux[:, :, row : row + SQUARE, column : column + SQUARE].flatten(2).transpose(1, 2)
            query = inner.vlm_uni_query_projector(images[:, token : token + 1])
            weights = (query @ inner.vlm_uni_aux_projector(square).transpose(1, 2) / 32**0.5).softmax(-1)
            mined[:, token] = (weights @ inner.vlm_uni_val_projector(square))[:, 0]
        return images, mined

    def encode_images(self, images: Tensor, images_aux: Tensor | None = None, is_video: bool = False) -> Tensor:
        tokens = self.model.vision_tower(images)
        if images_aux is not None:
            tokens, mined = self.unified_resampler(tokens, self.model.vision_tower_aux(images_aux))
            tokens = tokens + mined
        return self.model.mm_projector(tokens)

    def spliced(self, input_ids: Tensor, images: Tensor, images_aux: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings with each image in place of its marker, and the mask; rows without one use up no image here."""
        features, rows = iter(self.encode_images(images, images_aux)), []
        for row in input_ids:
            pieces = [
                next(features) if token == MARKER else self.model.embed_tokens(token[None])
                for token in row
                if token != 0
            ]
            rows.append(torch.cat(pieces))
        width = max(len(row) for row in rows)
        mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
        return torch.stack([F.pad(row, (0, 0, width - len(row), 0)) for row in rows]), mask

    def forward(self, input_ids: Any = None, images: Any = None, images_aux: Any = None, **kwargs: Any) -> Any:
        if images is not None:
            kwargs["inputs_embeds"], kwargs["attention_mask"] = self.spliced(input_ids, images, images_aux)
            input_ids = None
        return super().forward(input_ids, **kwargs)

    def generate(self, inputs: Tensor, images: Tensor, images_aux: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        embeddings, mask = self.spliced(inputs, images, images_aux)
        return super().generate(inputs_embeds=embeddings, attention_mask=mask, **kwargs)


def made(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = MGMConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, initializer_range=0.2, pad_token_id=0, eos_token_id=None, **changes,
    )  # fmt: skip
    return MGM(config).eval()


def given(count: int = 2) -> dict[str, Tensor]:
    """Two rows with an image each and one without; 0 pads."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[3, MARKER, 4, 5, 6], [0, 7, 8, MARKER, 9], [0, 0, 7, 11, 12]])
    images = torch.randn(count, 3, 8 * SIDE, 8 * SIDE, generator=generator)
    detailed = torch.randn(count, 3, 4 * SQUARE * SIDE, 4 * SQUARE * SIDE, generator=generator)
    return {"input_ids": ids, "images": images, "images_aux": detailed}


def expected(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """CLS scores, patches with what they mined are kept or merged; one token at a time."""
    tower = model.get_vision_tower().vision_tower
    tower.set_attn_implementation("eager")
    _, maps, keys = slow.encode(tower, inputs["images"], -2)
    tokens = model.model.vision_tower(inputs["images"])
    if "images_aux" in inputs:
        tokens = tokens + model.unified_resampler(tokens, model.model.vision_tower_aux(inputs["images_aux"]))[1]
    metric = keys[:, 1:].unflatten(-1, (4, -1)).mean(2)
    scores = maps[:, :, 0, 1:].sum(1)
    return [
        model.model.mm_projector(slow.compress(tokens[i], scores[i], metric[i], 7, 3, cls=False)[0])
        for i in range(len(tokens))
    ]


@pytest.mark.parametrize("detailed", [True, False])
@torch.no_grad()
def test_selection(detailed: bool) -> None:
    inputs = given()
    if not detailed:
        inputs.pop("images_aux")
    model = attach(made(), config=BUDGET)
    found = model.encode_images(*[inputs[name] for name in ("images", "images_aux") if name in inputs])
    torch.testing.assert_close(found, torch.stack(expected(made(), inputs)), rtol=1e-4, atol=1e-5)
    images = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert attached(model).token_counts(**images) == [(SIDE**2, 10)] * 2


@torch.no_grad()
def test_everything_kept_is_the_untouched_model() -> None:
    model, untouched, inputs = attach(made(), dominant=SIDE**2, contextual=0), made(), given()
    torch.testing.assert_close(model(**inputs).logits, untouched(**inputs).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generate_with_a_cache_and_without() -> None:
    model, inputs = visionzip(made(), dominant=7, contextual=3), given()
    ids = inputs.pop("input_ids")
    cached = model.generate(ids, **inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, model.generate(ids, **inputs, max_new_tokens=5, do_sample=False, use_cache=False))
    row = model.generate(
        ids[1:2], **{name: value[1:] for name, value in inputs.items()}, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(row[0], cached[1])


def test_gradient_reaches_the_projector_and_nothing_else() -> None:
    model, inputs = attach(made(), config=BUDGET), given()
    model.requires_grad_(False)
    assert attached(model).projector_names == [PROJECTOR]
    model.get_submodule(PROJECTOR).requires_grad_(True)
    logits = model(**inputs).logits
    logits.square().mean().backward()
    reached = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert reached == [f"{PROJECTOR}.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]

    slow_model = made()
    slow_model.requires_grad_(False)
    slow_model.get_submodule(PROJECTOR).requires_grad_(True)
    slow_model.__dict__["encode_images"] = lambda *_: torch.stack(expected(slow_model, inputs))
    slow_model(**inputs).logits.square().mean().backward()
    for name in reached:
        ours, theirs = model.get_parameter(name).grad, slow_model.get_parameter(name).grad
        assert (ours - theirs).norm() / theirs.norm() < 1e-5, name


@torch.no_grad()
def test_detach_copies_and_projector_files(tmp_path: Any) -> None:
    model, inputs, untouched = attach(made(), config=BUDGET), given(), made()
    compressed = model(**inputs).logits
    twin = copy.deepcopy(model)
    detach(model)
    assert torch.equal(model(**inputs).logits, untouched(**inputs).logits)
    assert "encode_images" not in model.__dict__
    assert torch.equal(twin(**inputs).logits, compressed)
    for parameter in twin.get_submodule(PROJECTOR).parameters():
        parameter.add_(0.1)
    save_projector(twin, tmp_path)
    attach(model, config=BUDGET)
    load_into(model, tmp_path)
    assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    assert not torch.equal(model(**inputs).logits, compressed)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="HD models"):
        attach(made(image_grid=2), config=BUDGET)
    with pytest.raises(ValueError, match="attach it without a processor"):
        attach(made(), tiny_processor(), BUDGET)
    with pytest.raises(ValueError, match="makes 36 tokens"):
        attach(made(), dominant=40, contextual=1)
    with pytest.raises(ValueError, match="has no get_vision_tower"):
        attach(LlamaForCausalLM(made().config), config=BUDGET)
