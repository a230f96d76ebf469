"""The CLIP adapter reads one layer exactly as transformers computes it, and computes nothing else."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from visionzip.encoders import base, encoder_for
from visionzip.encoders.base import CHUNK, attention_from_cls, attention_received


def tower(image=32, patch=8, heads=4, layers=3, attention="sdpa"):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=8 * heads,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
        initializer_range=0.5,
    )
    return CLIPVisionModel._from_config(config, attn_implementation=attention).eval()


SIZES = [(32, 8, 4, 3), (56, 14, 2, 2), (64, 16, 1, 5), (8, 8, 3, 1)]


@pytest.mark.parametrize(("image", "patch", "heads", "layers"), SIZES)
@torch.no_grad()
def test_one_layer_equals_eager_attention_maps(image, patch, heads, layers):
    """Hidden state, CLS row and keys equal those of a full eager run that returns every map."""
    eager, sdpa = tower(image, patch, heads, layers, "eager"), tower(image, patch, heads, layers)
    pixels = torch.randn(2, 3, image, image)
    maps = eager(pixels, output_attentions=True, output_hidden_states=True)
    keys = {}
    for layer in range(1, layers + 1):
        block = eager.encoder.layers[layer - 1].self_attn
        handle = block.k_proj.register_forward_hook(lambda m, i, out, at=layer: keys.__setitem__(at, out))
        eager(pixels)
        handle.remove()
        features = encoder_for(sdpa).encode(sdpa, pixels, layer)
        torch.testing.assert_close(features.hidden_states, maps.hidden_states[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.scores, maps.attentions[layer - 1][:, :, 0].sum(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            features.metric, keys[layer].unflatten(-1, (heads, -1)).mean(2), rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_bit_equal_to_hidden_states_with_the_same_attention():
    model = tower(layers=5)
    pixels = torch.randn(2, 3, 32, 32)
    stock = model(pixels, output_hidden_states=True).hidden_states
    for layer in (-1, -2, -5, 3):
        assert torch.equal(encoder_for(model).encode(model, pixels, layer).hidden_states, stock[layer])


def test_layers_after_the_one_read_are_not_run():
    model = tower(layers=5)
    ran = []
    for number, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    encoder_for(model).encode(model, torch.randn(1, 3, 32, 32), -2)
    assert ran == [0, 1, 2, 3]


def test_no_scores_where_the_selector_needs_none():
    model = tower()
    model.encoder.layers[1].self_attn.q_proj.register_forward_hook(lambda m, i, out: rows.append(out.shape[1]))
    rows = []
    assert encoder_for(model).encode(model, torch.randn(1, 3, 32, 32), -2, scores=False).scores is None
    assert rows == [17]  # the layer's own pass alone
    rows.clear()
    encoder_for(model).encode(model, torch.randn(1, 3, 32, 32), -2)
    assert rows == [17, 1]  # and one row for CLS


@torch.no_grad()
def test_several_layers_are_joined_and_the_deepest_is_scored():
    model = tower(layers=4)
    pixels = torch.randn(2, 3, 32, 32)
    stock = model(pixels, output_hidden_states=True).hidden_states
    features = encoder_for(model).encode(model, pixels, [-4, -2])
    assert torch.equal(features.hidden_states, torch.cat([stock[-4], stock[-2]], dim=-1))
    assert torch.equal(features.scores, encoder_for(model).encode(model, pixels, -2).scores)


def test_nothing_of_the_encoder_is_kept_for_backward():
    model = tower()
    features = encoder_for(model).encode(model, torch.randn(1, 3, 32, 32), -2)
    assert not features.hidden_states.requires_grad
    assert not features.scores.requires_grad


@pytest.mark.parametrize("layer", [0, -4, 4, -5, [], [0]])
def test_layers_that_can_not_be_read(layer):
    model = tower(layers=3)
    with pytest.raises(ValueError, match="layer"):
        encoder_for(model).encode(model, torch.randn(1, 3, 32, 32), layer)


def test_unsupported_encoder_is_named():
    with pytest.raises(ValueError, match=r"Linear is not supported.*CLIPVisionModel"):
        encoder_for(torch.nn.Linear(2, 2))


def test_attention_received_in_chunks_equals_the_whole_map():
    queries, keys = torch.randn(2, 3, CHUNK + 70, 8), torch.randn(2, 3, CHUNK + 70, 8)
    whole = (queries @ keys.transpose(-1, -2) * 0.3).softmax(-1).mean(dim=(1, 2))
    torch.testing.assert_close(attention_received(queries, keys, 0.3), whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scores", [True, False])
def test_on_a_cpu_images_go_through_in_slices_that_change_nothing(monkeypatch, scores):
    model = tower()
    pixels = torch.randn(5, 3, 32, 32)
    whole = encoder_for(model).encode(model, pixels, [1, -1], scores=scores)
    seen: list[int] = []
    model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda m, i, out: seen.append(out.numel() * 4))
    monkeypatch.setattr(base, "SLICE_BYTES", 2 * 17 * 64 * 4 + 1)  # the widest activation of two images
    sliced = encoder_for(model).encode(model, pixels, [1, -1], scores=scores)
    assert seen == [2 * 17 * 64 * 4, 2 * 17 * 64 * 4, 17 * 64 * 4]
    assert sliced.has_cls
    torch.testing.assert_close(sliced.hidden_states, whole.hidden_states, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sliced.metric, whole.metric, rtol=1e-5, atol=1e-6)
    if scores:
        torch.testing.assert_close(sliced.scores, whole.scores, rtol=1e-5, atol=1e-6)
    else:
        assert sliced.scores is None


def test_an_image_wider_than_a_slice_goes_alone_and_an_accelerator_takes_all_at_once(monkeypatch):
    monkeypatch.setattr(base, "SLICE_BYTES", 1)
    model = tower()
    adapter = encoder_for(model)
    assert adapter.at_once(model, torch.randn(3, 3, 32, 32)) == 1
    assert adapter.at_once(model, torch.empty(3, 3, 32, 32, device="meta")) == 3


def test_large_queries_and_keys_do_not_overflow_in_float16():
    """64 products of 40 · 40 are more than float16 holds; scaled they are not."""
    query, keys = torch.full((1, 2, 1, 64), 40.0), torch.full((1, 2, 5, 64), 40.0)
    keys[:, :, 1:] = 30.0
    exact = attention_from_cls(query, keys, 64**-0.5)
    torch.testing.assert_close(attention_from_cls(query.half(), keys.half(), 64**-0.5), exact)


@pytest.mark.parametrize(("dtype", "inside"), [(torch.float16, False), (torch.bfloat16, False), (torch.float32, True)])
def test_half_precision_is_not_widened_by_a_trainers_autocast(dtype, inside):
    """What a cache was written with is what training on pixels computes; a float32 encoder may be run faster."""
    model = tower().to(dtype)
    seen = []

    def note(module, args):
        seen.append(torch.is_autocast_enabled("cpu"))
        raise InterruptedError  # what follows is no matter, and not every CPU has half-precision kernels

    model.embeddings.register_forward_pre_hook(note)
    with pytest.raises(InterruptedError), torch.autocast("cpu", dtype=torch.bfloat16):
        encoder_for(model).encode(model, torch.randn(1, 3, 32, 32), -2)
    assert seen == [inside]
