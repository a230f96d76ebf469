"""Vision graphs of every kind of encoder against PyTorch, weights of other precisions, and what can't be exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tests.export.conftest import BUDGET, ROOT
from tests.families.case import cases
from tests.tiny import tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, save
from visionzip.cli import main
from visionzip.device.runtime import open_session
from visionzip.export import FORMATS, read_export, recognise
from visionzip.export.onnx import parse_precision
from visionzip.export.onnx_graphs import Weights, language_graph, quantize, vision_graph
from visionzip.selectors import SELECTORS, selector


def with_encoder(kind):
    """A random LLaVA of 16 patches with another vision encoder."""
    from transformers import Dinov2WithRegistersConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    text = tiny_llava().config.text_config
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    vision = {
        "dinov2": Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=2, initializer_range=0.3),
        "siglip": SiglipVisionConfig(**sizes, intermediate_size=64),
    }[kind]
    torch.manual_seed(0)
    strategy = "full" if kind == "siglip" else "default"
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=4, vision_feature_select_strategy=strategy
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # random weights that tell patches apart
        for parameter in model.model.vision_tower.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("kind", "merge"), [("dinov2", "add"), ("siglip", "mean")])
def test_the_same_tokens_are_kept_and_embedded(kind, merge, tmp_path):
    model = attach(with_encoder(kind), config=ZipConfig(dominant=5, contextual=3, merge=merge))
    attachment = attached(model)
    graph = vision_graph(attachment, attachment.config, 32, 20)
    weights = Weights(tmp_path / "weights.data")
    weights.save(graph.program, tmp_path / "vision.onnx")
    weights.close()
    session = open_session(tmp_path / "vision.onnx", 1)
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 32, 32)
        found, kept = session.run(["embeddings", "kept"], {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            expected = attachment.family.compress_batch(attachment.config, pixels)
            embeddings = torch.stack(attachment.project(list(expected.tokens)))
        assert np.array_equal(kept, expected.kept.numpy())
        assert np.abs(found - embeddings.numpy()).max() < 1e-4


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_grouped_tiles_are_kept_and_embedded_alike(name, tmp_path):
    """A tile at a time, in batches of any size."""
    case = next(case for case in cases() if case.name == name)
    model = attach(case.model(), config=case.budget)
    attachment = attached(model)
    side = model.config.vision_config.image_size
    graph = vision_graph(attachment, attachment.config, side, 20)
    weights = Weights(tmp_path / "weights.data")
    weights.save(graph.program, tmp_path / "vision.onnx")
    weights.close()
    session = open_session(tmp_path / "vision.onnx", 1)
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, side, side)
        found, kept = session.run(["embeddings", "kept"], {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            expected = attachment.family.compress_batch(attachment.config, pixels)
            embeddings = torch.stack(attachment.project(list(expected.tokens)))
        assert np.array_equal(kept, expected.kept.numpy())
        assert np.abs(found - embeddings.numpy()).max() < 1e-4


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_weights_of_another_precision(torch_model, tmp_path, precision):
    """The graph takes and gives what the float32 one does, is smaller, and says nearly the same."""
    sizes = {}
    names = [f"past.{layer}.{kind}" for layer in range(3) for kind in ("key", "value")]
    given = {"input_ids": np.array([[1, 50, 60, 70]]), "image_embeds": np.zeros((1, 96), np.float32)}
    given |= dict.fromkeys(names, np.zeros((1, 4, 0, 24), np.float32))
    logits = {}
    for name in ("float32", precision):
        weights = Weights(tmp_path / f"{name}.data")
        fresh = language_graph(attached(torch_model[0]), 20).program  # saving moves its tensors to the file
        weights.save(quantize(fresh, name), tmp_path / f"{name}.onnx")
        weights.close()
        sizes[name] = (tmp_path / f"{name}.data").stat().st_size
        logits[name] = open_session(tmp_path / f"{name}.onnx", 1).run(["logits"], given)[0].reshape(-1)
    finite = np.isfinite(logits["float32"])
    assert np.array_equal(finite, np.isfinite(logits[precision]))
    assert np.corrcoef(logits["float32"][finite], logits[precision][finite])[0, 1] > (
        0.9 if precision == "int4" else 0.99
    )
    assert sizes[precision] < 0.6 * sizes["float32"]


def test_it_is_an_export_that_pytorch_can_not_load(exported):
    assert recognise(exported) is FORMATS["onnx"]
    assert FORMATS["onnx"].read(exported).header.zip == ZipConfig(dominant=13, contextual=3)
    assert FORMATS["onnx"].problems(exported) == []
    with pytest.raises(ValueError, match="can't be loaded with PyTorch"):
        read_export(exported)


def test_what_can_not_be_exported(tmp_path, monkeypatch):
    def refused(config=BUDGET, **options):
        model = attach(tiny_llava(), tiny_processor(), config)
        with pytest.raises(ValueError, match=r".") as caught:
            save(model, tmp_path / "out", "onnx", **options)
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "opset 11 is too old: the graphs use operators of opset 20" in refused(opset=11)
    assert "precision 'int3' is not known" in refused(precision="int3")
    assert "positions=original can't be exported" in refused(BUDGET.model_copy(update={"positions": "original"}))
    model = attach(tiny_llava(), tiny_processor(), BUDGET)
    model.config.model_type = "llava_next"
    with pytest.raises(
        ValueError, match="model type 'llava_next' can't be exported to ONNX; supported: idefics3, llava, smolvlm"
    ):
        save(model, tmp_path / "out", "onnx")


def test_a_selector_whose_result_depends_on_the_image_is_refused():
    @selector("as_bright", needs_scores=False)
    def choose(features, keep):
        patches = features.hidden_states.shape[1] - 1
        first = 0 if features.hidden_states.mean() > 0 else patches - keep  # a choice that Python makes
        return torch.arange(first, first + keep).expand(features.hidden_states.shape[0], -1)

    try:
        attachment = attached(attach(tiny_llava(), config=ZipConfig(dominant=5, contextual=3, selector="as_bright")))
        with pytest.raises(
            ValueError, match="the selector 'as_bright' with the budget 5 \\+ 3 can't be written as a graph"
        ):
            vision_graph(attachment, attachment.config, 32, 20)
    finally:
        del SELECTORS._entries["as_bright"]


def test_precision_by_part():
    assert parse_precision(None) == {"vision": "float32", "language": "float32"}
    assert parse_precision("language=int8") == {"vision": "float32", "language": "int8"}
    assert parse_precision("int4") == {"vision": "int4", "language": "int4"}


def test_the_command_names_what_it_does_not_know(capsys, tmp_path):
    assert (
        main(
            [
                "export",
                str(ROOT / "data/tiny-llava"),
                "--format",
                "onnx",
                "--opset",
                "9",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "opset 9 is too old" in capsys.readouterr().err
