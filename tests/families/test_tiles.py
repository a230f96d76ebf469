"""Tiles, pooling and budgets by themselves: the authors' order, transformers' arithmetic, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from tests.families import slow
from tests.families.case import Case, make_image
from tests.families.case_llava_next import CASE as NEXT
from tests.families.case_llava_onevision import CASE as ONEVISION
from tests.families.case_llava_onevision import tile_budget
from tests.families.case_video_llava import CASE as VIDEO
from tests.tiny import REFERENCE
from visionzip import ZipConfig, attach, attached, visionzip
from visionzip.encoders import encoder_for
from visionzip.families.llava_onevision import share, with_newlines
from visionzip.families.tiles import pack_tiles, tile_grid
from visionzip.families.video import bilinear_corners

GOLDEN = sorted(path.name for path in REFERENCE.glob("next_*"))


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_order_of_tiles(case: str) -> None:
    """Exactly the authors' sequence."""
    about = json.loads((REFERENCE / case / "case.json").read_text())
    data = load_file(REFERENCE / case / "expected.safetensors")
    grid = about["grid_height"], about["grid_width"]
    packed = pack_tiles(
        data["tile_tokens"], data["kept_indices"], about["contextual"], grid, about["patches_per_side"], has_cls=True
    )
    assert torch.equal(packed, data["packed"])


def test_both_golden_orders_are_there() -> None:
    assert GOLDEN == ["next_1x3", "next_2x2"]


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(("rows", "columns", "side"), [(1, 2, 3), (3, 2, 4), (2, 3, 5)])
def test_order_of_any_grid(rows: int, columns: int, side: int, cls: bool) -> None:
    """Against a walk over the stitched image, spot by spot."""
    generator = torch.Generator().manual_seed(rows * 10 + columns)
    count, patches, contextual = rows * columns, 4, 2
    kept = torch.stack([torch.randperm(side**2, generator=generator)[:patches].sort().values for _ in range(count)])
    if cls:
        kept = torch.cat([torch.zeros(count, 1, dtype=torch.long), kept + 1], dim=1)
    tokens = torch.randn(count, kept.shape[1] + contextual, 3, generator=generator)
    order = slow.raster(kept.tolist(), columns, side, cls)
    expected = [tokens[tile, place] for tile, place in order]
    expected += [tokens[tile, 0] for tile in range(count) if cls]
    expected += [token for tile in range(count) for token in tokens[tile, -contextual:]]
    assert torch.equal(pack_tiles(tokens, kept, contextual, (rows, columns), side, cls), torch.stack(expected))


def test_a_grid_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="2 × 2 tiles has 4, but the tokens of 3"):
        pack_tiles(torch.zeros(3, 4, 1), torch.zeros(3, 2, dtype=torch.long), 2, (2, 2), 4, True)


@pytest.mark.parametrize("size", [(336, 672), [480, 640], torch.tensor([1000, 333]), torch.tensor([337, 336])])
def test_grid_equals_transformers(size: object) -> None:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    rows, columns = tile_grid(size, pinpoints, 336)  # type: ignore[arg-type]
    assert rows * columns + 1 == image_size_to_num_patches(
        size if isinstance(size, torch.Tensor) else tuple(size), pinpoints, 336
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [2, 3, 8, 27, 31])
def test_corners_are_what_interpolate_does(side: int) -> None:
    pooled = -(-side // 2)
    places, weights = bilinear_corners(side, pooled, torch.device("cpu"))
    grid = torch.randn(2, 5, side, side)
    expected = F.interpolate(grid, size=[pooled, pooled], mode="bilinear").flatten(2).transpose(1, 2)
    found = (grid.flatten(2).transpose(1, 2)[:, places.flatten()].unflatten(1, (-1, 4)) * weights[..., None]).sum(2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiles", [1, 2, 9, 10, 12, 36])
def test_a_large_grid_shares_what_nine_tiles_get(tiles: int) -> None:
    config = ZipConfig(dominant=54, contextual=10)
    found = share((54, 10), tiles, 9)
    assert found == tile_budget(config, tiles)
    assert tiles * sum(found) <= 9 * 64


@pytest.mark.parametrize("grid", [(27, 27), (54, 81), (81, 90), (160, 162), (40, 162)])
def test_stock_length_of_a_onevision_grid_equals_transformers(grid: tuple[int, int]) -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=27 * 14, patch_size=14),
        image_grid_pinpoints=[[27 * 14 * rows, 27 * 14 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    )
    rows, columns = -(-grid[0] // 27), -(-grid[1] // 27)
    tokens = torch.zeros(rows * columns + 1, 729, 2)
    size = (27 * 14 * rows, 27 * 14 * columns)
    packed, lengths = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config), [tokens], [size], torch.zeros(2), "anyres_max_9"
    )
    assert int(lengths[0]) == len(packed[0]) == 729 + with_newlines((rows * 27, columns * 27), 27, 9)


@pytest.mark.parametrize("text", ["mistral", "qwen2"])
@pytest.mark.parametrize("family", [NEXT, ONEVISION], ids=str)
@torch.no_grad()
def test_other_language_models(family: Case, text: str) -> None:
    """The same family stands on several: LLaVA-NeXT on Vicuna, Mistral, Yi and Qwen, LLaVA-OneVision on Qwen."""

    class Other(type(family)):  # type: ignore[misc]
        def config(self) -> Any:
            config = super().config()
            values = {key: value for key, value in config.text_config.to_dict().items() if key != "model_type"}
            config.text_config = AutoConfig.for_model(text, **values)
            return config

    case = Other()
    model, processor = case.model(), case.processor()
    assert type(model.model.language_model).__name__.lower().startswith(text)
    attach(model, processor, case.budget)
    inputs = case.process(processor, [case.prompt()], [[make_image(0, case.sizes[0])]])
    untouched = case.model("eager")
    expected = case.logits(untouched, inputs, case.reference(untouched, case.budget, inputs))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


class TestSiglip:
    def tower(self, attention: str = "sdpa") -> SiglipVisionModel:
        torch.manual_seed(0)
        config = SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=40, patch_size=8,
            vision_use_head=False,
        )  # fmt: skip
        return SiglipVisionModel._from_config(config, attn_implementation=attention).eval()

    @pytest.mark.parametrize("layer", [-1, -2, 1])
    @torch.no_grad()
    def test_one_layer_equals_the_maps(self, layer: int) -> None:
        """Not the normalised output, also at the last layer; scores are what a token receives."""
        pixels = torch.randn(2, 3, 40, 40)
        hidden, maps, keys = slow.encode(self.tower("eager"), pixels, layer)
        tower = self.tower()
        features = encoder_for(tower).encode(tower, pixels, layer)
        torch.testing.assert_close(features.hidden_states, hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.scores, maps.mean((1, 2)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(features.metric, keys.unflatten(-1, (4, -1)).mean(2), rtol=1e-4, atol=1e-5)
        assert torch.equal(features.hidden_states, tower(pixels, output_hidden_states=True).hidden_states[layer])
        assert not features.has_cls
        assert encoder_for(tower).tokens(tower) == 25

    def test_layers_after_the_one_read_are_not_run(self) -> None:
        tower, ran = self.tower(), []
        for number, block in enumerate(tower.encoder.layers):
            block.register_forward_hook(lambda *_, number=number: ran.append(number))
        encoder_for(tower).encode(tower, torch.randn(1, 3, 40, 40), -2)
        assert ran == [0, 1]


class TestRefused:
    def test_prompts_of_a_stock_processor(self) -> None:
        with pytest.raises(ValueError, match="the number of placeholders depends on the image"):
            visionzip(NEXT.model(), dominant=54, contextual=10)

    def test_other_pinpoints(self) -> None:
        processor = NEXT.processor()
        processor.image_processor.image_grid_pinpoints = [[336, 336], [672, 672]]
        with pytest.raises(
            ValueError, match=r"grid pinpoints \[\[336, 336\], \[672, 672\]\] \(the model: \[\[336, 672\]"
        ):
            attach(NEXT.model(), processor, NEXT.budget)

    def test_another_number_of_tokens(self) -> None:
        processor = ONEVISION.processor()
        processor.num_image_tokens = 576
        with pytest.raises(ValueError, match=r"tokens of a tile 576 \(the model: 729\)"):
            attach(ONEVISION.model(), processor, ONEVISION.budget)

    def test_not_a_processor_that_does_not_say(self) -> None:
        """Older checkpoints leave the patch size out, which only a stock processor's own counting needs."""
        processor = NEXT.processor()
        processor.patch_size = None
        model = attach(NEXT.model(), processor, NEXT.budget)
        inputs = NEXT.process(processor, [NEXT.prompt()], [[make_image()]])
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 5 * 32

    def test_another_video_token(self) -> None:
        processor = VIDEO.processor()
        processor.video_token_id = 7
        with pytest.raises(ValueError, match="video token id 7"):
            attach(VIDEO.model(), processor, VIDEO.budget)

    def test_more_than_a_frame_has(self) -> None:
        """A frame of LLaVA-OneVision has 196 positions, an image's tile 729; a budget in tokens has to fit both."""
        with pytest.raises(
            ValueError, match=r"for the frames of a video, a budget of dominant=300 .* makes 196 tokens"
        ):
            attach(ONEVISION.model(), ONEVISION.processor(), ZipConfig(dominant=300, contextual=0))

    def test_onevision_with_a_cls_token(self) -> None:
        model = ONEVISION.model()
        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=384,
            patch_size=14,
        )
        model.model.vision_tower = CLIPVisionModel(config)
        with pytest.raises(ValueError, match="CLIPVisionModel has a CLS token"):
            attach(model, ONEVISION.processor(), ONEVISION.budget)

    def test_tiles_that_are_not_those_of_the_sizes(self) -> None:
        model, processor = NEXT.model(), NEXT.processor()
        attach(model, processor, NEXT.budget)
        inputs = NEXT.process(processor, [NEXT.prompt()], [[make_image()]])
        with pytest.raises(ValueError, match="do not hold the 5 tiles"):
            attached(model).compress(pixel_values=inputs["pixel_values"][0, :3], image_sizes=inputs["image_sizes"])
