"""DINOv2, with and without registers: what is read equals what transformers computes, at any image size, without the registers."""

from __future__ import annotations

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from visionzip.encoders import base, encoder_for

REGISTERS = 3
KINDS = ["plain", "registers", "swiglu"]


def tower(kind="plain", attention="sdpa", layers=4, image=56):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": image,
        "initializer_range": 0.5,
        "layerscale_value": 0.7,
        "use_swiglu_ffn": kind == "swiglu",
    }
    if kind == "registers":
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=REGISTERS)
        model = Dinov2WithRegistersModel._from_config(config, attn_implementation=attention)
        model.embeddings.register_tokens.data.normal_()
        return model.eval()
    return Dinov2Model._from_config(Dinov2Config(**sizes), attn_implementation=attention).eval()


def cut(tokens, kind):
    """Of ``(B, N, …)`` CLS and patches."""
    return torch.cat((tokens[:, :1], tokens[:, 1 + REGISTERS :]), dim=1) if kind == "registers" else tokens


@pytest.mark.parametrize("size", [(56, 56), (70, 70), (84, 56)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bit_equal_to_hidden_states(kind, size):
    model = tower(kind)
    pixels = torch.randn(2, 3, *size)
    stock = model(pixels, output_hidden_states=True).hidden_states
    assert len(stock) == 5
    for layer in (-1, -2, 1, 4):
        features = encoder_for(model).encode(model, pixels, layer)
        assert torch.equal(features.hidden_states, cut(stock[layer], kind))
        assert features.hidden_states.shape[1] == 1 + size[0] // 14 * (size[1] // 14)
        assert features.has_cls


@pytest.mark.parametrize("size", [(56, 56), (84, 56)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_and_keys_equal_the_eager_attention_row(kind, size):
    eager, sdpa = tower(kind, "eager"), tower(kind)
    pixels = torch.randn(2, 3, *size)
    maps = eager(pixels, output_attentions=True).attentions
    for layer in (1, 3, 4):
        keys = []
        handle = eager.encoder.layer[layer - 1].attention.k_proj.register_forward_hook(
            lambda m, i, out, keys=keys: keys.append(out)
        )
        eager(pixels)
        handle.remove()
        features = encoder_for(sdpa).encode(sdpa, pixels, layer)
        torch.testing.assert_close(features.scores, cut(maps[layer - 1][:, :, 0].sum(1), kind), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            features.metric, cut(keys[0].unflatten(-1, (4, -1)).mean(2), kind), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_several_layers_and_none_after_the_deepest(kind):
    model = tower(kind)
    pixels = torch.randn(2, 3, 56, 56)
    stock = model(pixels, output_hidden_states=True).hidden_states
    ran = []
    for number, block in enumerate(model.encoder.layer):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    features = encoder_for(model).encode(model, pixels, [1, -2], scores=False)
    assert torch.equal(features.hidden_states, cut(torch.cat([stock[1], stock[-2]], dim=-1), kind))
    assert features.scores is None
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_slices_on_a_cpu_are_as_wide_as_its_mlp(kind, monkeypatch):
    model = tower(kind)
    widest = []
    for part in model.encoder.layer[0].mlp.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda m, i, out: widest.append(out.shape[-1]))
    pixels = torch.randn(4, 3, 56, 56)
    whole = encoder_for(model).encode(model, pixels, -2)
    assert encoder_for(model).width(model) == max(widest)
    monkeypatch.setattr(base, "SLICE_BYTES", 2 * 17 * max(widest) * 4)
    assert encoder_for(model).at_once(model, pixels) == 2
    sliced = encoder_for(model).encode(model, pixels, -2)
    torch.testing.assert_close(sliced.hidden_states, whole.hidden_states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sliced.scores, whole.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_layers_that_can_not_be_read(kind):
    model = tower(kind, layers=2)
    adapter = encoder_for(model)
    assert adapter.tokens(model) == 17
    assert adapter.depth(model) == 2
    for layer in (0, 3, -4):
        with pytest.raises(ValueError, match="layer"):
            adapter.encode(model, torch.randn(1, 3, 56, 56), layer)
