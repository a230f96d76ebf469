"""Which budget each sample is trained at, and an entry of the token cache that serves them all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cache.budgets import CompressToEach, count_tokens, tokens_at
from data.cache.build import fill
from data.cache.identity import CacheError, check_identity
from data.cache.reader import VISUAL, CachedTokens
from data.collate import BRANCHES
from data.dataset import build_dataset
from data.elastic import BudgetDraw, Drawn, DrawnOrder
from data.images import PixelImages
from data.mixture import EpochSampler
from data.sample import NO_SAMPLE_INDEX, Media, Reject, Sample
from tests.data import kit
from tests.data.test_cache import make, place  # noqa: F401
from tests.data.test_cache_families import NEAR, loss_and_gradient, records
from tests.families.case import cases
from tests.tiny import tiny_llava, tiny_processor
from train.batches import BalancedBatches, ShareOfBatches
from train.cached import place_tokens, read_from_cache
from train.elastic import compress_at_budgets, placeholder_counts
from visionzip import ZipConfig, attach, attached
from visionzip.budgets import at_budget, ladder
from visionzip.selectors import SELECTORS

LIST = ZipConfig.model_validate({"dominant": 5, "contextual": 2, "budgets": [4, 7, 12]})
PLAIN = ZipConfig.model_validate({"dominant": 5, "contextual": 0, "budgets": [4, 7, 12]})
RANGE = ZipConfig.model_validate({"dominant": 5, "contextual": 0, "budgets": {"least": 3, "most": 12}})


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9), epoch=st.integers(0, 5), start=st.integers(0, 5000), cut=st.integers(1, 60))
def test_a_budget_is_a_function_of_seed_epoch_and_place(seed, epoch, start, cut):
    draw = BudgetDraw(RANGE, seed)
    whole = draw(epoch, start, 60)
    assert draw(epoch, start, cut) + draw(epoch, start + cut, 60 - cut) == whole
    assert whole != BudgetDraw(RANGE, seed + 1)(epoch, start, 60)
    assert whole != draw(epoch + 1, start, 60)


@pytest.mark.parametrize("density", [[0.6, 0.3, 0.1], [0.0, 0.5, 0.5]])
def test_every_step_has_budgets_in_proportion_to_their_density(density):
    config = ZipConfig.model_validate({**LIST.model_dump(), "budgets": {"totals": [4, 7, 12], "density": density}})
    drawn = [budgets[0] for budgets in BudgetDraw(config, 3)(0, 0, 6400)]
    for start in range(0, 6400, 64):
        counts = [drawn[start : start + 64].count(budget) / 64 for budget in ladder(config)]
        assert np.allclose(counts, density, atol=0.05)
    # A range draws small budgets more often: 2 - 2x falls to nothing.
    totals = [sum(budgets[0]) for budgets in BudgetDraw(RANGE, 0)(0, 0, 1000)]
    assert set(totals) == set(range(3, 13))
    assert totals.count(3) == pytest.approx(190, abs=5)
    assert totals.count(12) == pytest.approx(10, abs=3)


def test_several_budgets_of_a_sample_are_spread_over_the_density():
    for budgets in BudgetDraw(RANGE, 0, each=3)(0, 0, 200):
        totals = [sum(budget) for budget in budgets]
        assert totals == sorted(set(totals))
        assert totals[0] <= 5
        assert totals[-1] >= 7  # thirds of 2 - 2x end after 18 % and 42 % of the range
    assert {len(budgets) for budgets in BudgetDraw(LIST, 0, each=3)(0, 0, 50)} == {3}


class Lengths:
    def __getitem__(self, index) -> int:
        return index.index % 7 + sum(map(sum, index.budgets))


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_same_budgets_for_any_number_of_processes_and_micro_batches(epoch):
    def steps(make, world, accumulation):
        batches = []
        for rank in range(world):
            order = DrawnOrder(EpochSampler([37], [1.0], seed=5, global_batch=8), BudgetDraw(LIST, seed=5))
            order.set_epoch(epoch)
            batches.append(list(make(order, rank, world, 8 // world // accumulation, accumulation)))
        found = []
        for start in range(0, len(batches[0]), accumulation):
            step = [item for share in batches for batch in share[start : start + accumulation] for item in batch]
            found.append({item for item in step if item != NO_SAMPLE_INDEX})
        return found

    def random(order, rank, world, batch, accumulation):
        return ShareOfBatches(order, rank, world, batch)

    def balanced(order, rank, world, batch, accumulation):
        return BalancedBatches(order, rank, world, batch, accumulation, Lengths(), packed=True)

    expected = steps(random, 1, 1)
    assert [len(step) for step in expected] == [8, 8, 8, 8, 5]
    assert all(isinstance(item, Drawn) for step in expected for item in step)
    for make_batches in (random, balanced):
        for world, accumulation in ((1, 2), (1, 4), (2, 1), (2, 2), (4, 2), (8, 1)):
            assert steps(make_batches, world, accumulation) == expected


@pytest.mark.parametrize("selector", [name for name, entry in SELECTORS if not (entry.pools or entry.scales)])
@pytest.mark.parametrize("config", [LIST, PLAIN, RANGE])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_an_entry_has_the_tokens_of_each_budget_bit_for_bit(selector, config, positions):
    config = config.model_copy(update={"selector": selector, "positions": positions})
    attachment = attached(attach(tiny_llava(), tiny_processor(), config))
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nested = SELECTORS[selector].nested
    if not nested and not config.contextual:
        with pytest.raises(ValueError, match=f"the selector {selector} is not nested"):
            CompressToEach(attachment)
        return
    each = CompressToEach(attachment)
    images, about = each(pixel_values=pixels), json.loads(json.dumps(each.describe("<image>")))
    assert ("ranked" in images[0]) == nested
    for budget in ladder(config):
        expected = attachment.family.compress(at_budget(config, budget), pixel_values=pixels)
        for image, tokens in zip(images, expected, strict=True):
            found = tokens_at(image, about, budget)
            assert count_tokens([found]) == sum(budget)
            if positions == "compact":
                assert torch.equal(found, tokens)
            else:
                assert torch.equal(found["tokens"], tokens["tokens"])
                assert torch.equal(found["places"], tokens["places"])
    if nested and not config.contextual:  # one sequence, as long as the largest
        names = ["ranked", "places"] + ["stock"] * (positions == "original")
        assert {name: len(tensor) for name, tensor in images[0].items()} == dict.fromkeys(names, 12)


def test_any_budget_of_a_range_is_there_and_others_are_refused():
    config = RANGE.model_copy(update={"selector": "visionzip"})
    attachment = attached(attach(tiny_llava(), tiny_processor(), config))
    each = CompressToEach(attachment)
    pixels = torch.randn(1, 3, 32, 32)
    (image,), about = each(pixel_values=pixels), json.loads(json.dumps(each.describe("<image>")))
    (expected,) = attachment.family.compress(at_budget(config, (2, 0)), pixel_values=pixels)
    assert torch.equal(tokens_at(image, about, (2, 0)), expected)
    for budget in ((13, 0), (5, 1)):
        with pytest.raises(Reject, match="the budget"):
            tokens_at(image, about, budget)


def test_a_long_list_that_would_be_stored_apart_is_refused(monkeypatch):
    config = ZipConfig.model_validate({"dominant": 5, "contextual": 2, "budgets": {"least": 3, "most": 12}})
    attachment = attached(attach(tiny_llava(), tiny_processor(), config))
    CompressToEach(attachment)
    monkeypatch.setattr("data.cache.budgets.MOST", 9)
    with pytest.raises(ValueError, match="at most 9 budgets separately, found 10"):
        CompressToEach(attachment)


SEVERAL = {"dominant": 27, "contextual": 5, "budgets": [8, 20, 32]}


@pytest.mark.parametrize(
    ("name", "positions"), [("LLaVA-1.5", "compact"), ("LLaVA-1.5", "original"), ("LLaVA-NeXT", "compact")]
)
def test_losses_and_gradients_at_each_samples_budget_are_those_from_pixels(name, positions, tmp_path, monkeypatch):
    case = next(case for case in cases() if case.name == name)
    model, processor = case.model().requires_grad_(False), case.processor()
    config = ZipConfig.model_validate(SEVERAL | {"positions": positions})
    attachment = attached(attach(model, processor, config))
    model.get_submodule(attachment.projector_names[0]).requires_grad_(True)
    path = kit.write_json(tmp_path / "a.json", records(case, tmp_path))
    data = kit.data_config(tmp_path, path, max_length=16384)
    (tmp_path / "tokens").mkdir()
    ran, encode = [], type(attachment.family).encode
    monkeypatch.setattr(
        type(attachment.family), "encode", lambda *args, **kwargs: ran.append(1) or encode(*args, **kwargs)
    )
    fill(tmp_path / "tokens", attachment, processor, data, device=torch.device("cpu"), dtype=torch.float32, workers=0)
    assert len(ran) == 2, "a batch and the blank image: once each, whatever the number of budgets"
    small, middle, large = ladder(config)
    wanted = [Drawn(0, (middle,)), Drawn(1, (small,)), Drawn(2, (small, large))]
    read_from_cache(model)
    found = {}
    for way, images in {
        "pixels": PixelImages(data, processor, placeholder_counts(attachment)),
        "cache": CachedTokens(tmp_path / "tokens", data.frames),
    }.items():
        dataset = build_dataset(data, processor, 0, images=images)
        batch = place_tokens(
            model, compress_at_budgets(model, dataset.collator()([dataset[index] for index in wanted]))
        )
        assert batch.pop(BRANCHES) == [1, 1, 2]
        assert ("position_ids" in batch) == (positions == "original")
        text = place_tokens(model, compress_at_budgets(model, dataset.collator()([dataset[Drawn(1, (large,))]])))
        found[way] = [*loss_and_gradient(model, batch), *loss_and_gradient(model, text)]
    for a, b in zip(found["pixels"], found["cache"], strict=True):
        assert (a - b).norm() <= NEAR * b.norm()
    assert found["pixels"][1].norm() > 0


def test_one_cache_serves_every_budget_of_its_list(place):  # noqa: F811
    folder = place / "elastic"
    make(place, folder, zip_config=LIST)
    found = {}
    for budget in (None, *ladder(LIST)):
        read = CachedTokens(folder, frames=8, budget=budget)
        item = read(Sample("s", [], [Media("image", str(place / "1.png"))]))
        found[budget] = len(item.inputs[VISUAL][0])
        assert item.placeholders == ["<image>" * found[budget]]
    assert list(found.values()) == [4, 4, 7, 12]
    drawn = CachedTokens(folder, frames=8)(Sample("s", [], [Media("image", str(place / "1.png"))], budget=(6, 1)))
    assert len(drawn.inputs[VISUAL][0]) == 7
    stored = json.loads((folder / "cache.json").read_text())
    fixed = ZipConfig(dominant=6, contextual=1)
    wanted = {**stored, "zip": fixed.model_dump(exclude={"pad_images"})}
    check_identity(folder, wanted)
    for dominant, contextual in ((5, 2), (6, 2)):
        other = ZipConfig(dominant=dominant, contextual=contextual)
        with pytest.raises(CacheError, match=r"zip\.budgets"):
            check_identity(folder, {**stored, "zip": other.model_dump(exclude={"pad_images"})})
    with pytest.raises(CacheError, match=r"zip\.selector: visionzip there, divprune here"):
        check_identity(folder, {**wanted, "zip": {**wanted["zip"], "selector": "divprune"}})
