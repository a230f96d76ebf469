"""What an epoch holds: the same on every machine, nothing twice, and what was not yet seen after a resume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from data.index import DiskTable
from data.mixture import EpochSampler, hash_positions, select_subset
from data.sample import NO_SAMPLE, NO_SAMPLE_INDEX
from tests.data import kit
from train.batches import ShareOfBatches


def test_the_subset_is_the_same_on_every_machine():
    """Written down: another numpy, word size or byte order must not give another tenth."""
    splitmix64 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # the published outputs for seed 0
    assert hash_positions(3, 0).tolist() == splitmix64
    assert select_subset(1000, 0.01, None, 0).tolist() == [203, 254, 366, 410, 503, 543, 566, 821, 930, 986]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 400),
    fraction=st.floats(0.001, 1),
    maximum=st.none() | st.integers(1, 500),
    seed=st.integers(0, 9),
)
def test_subsets_have_the_size_asked_for_and_lie_in_each_other(count, fraction, maximum, seed):
    kept = select_subset(count, fraction, maximum, seed)
    assert len(kept) == min(max(1, round(count * fraction)), maximum or count, count)
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < count
    assert set(kept) <= set(select_subset(count, min(1, fraction * 1.5), maximum, seed))


def test_subsets_are_spread_and_differ_by_seed():
    kept = select_subset(100_000, 0.1, None, 0)
    assert np.allclose(np.histogram(kept, 10, (0, 100_000))[0], 1000, atol=120)
    assert len(set(kept) & set(select_subset(100_000, 0.1, None, 1))) == pytest.approx(1000, abs=120)


def test_a_subset_is_taken_from_the_file(tmp_path):
    path = kit.write_json(tmp_path / "a.json", kit.text_records(50))
    data = kit.dataset(tmp_path, {"path": path, "fraction": 0.2})
    assert len(data) == 10
    assert isinstance(data.sources[0].subset, DiskTable)
    expected = select_subset(50, 0.2, None, 0)
    assert [data.sample(n).id for n in range(10)] == [f"r{position}" for position in expected]
    assert len(kit.dataset(tmp_path, {"path": path, "fraction": 0.2, "max_samples": 3})) == 3
    assert len(kit.dataset(tmp_path, {"path": path, "max_samples": 500})) == 50


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    seed=st.integers(0, 3),
    batch=st.integers(1, 16),
    epoch=st.integers(0, 4),
)
def test_an_epoch_is_every_record_once_and_filling(sizes, seed, batch, epoch):
    sampler = EpochSampler(sizes, [1.0] * len(sizes), seed, batch)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert len(order) % batch == 0
    assert len(order) - sum(sizes) < batch
    assert sorted(order[: sum(sizes)]) == list(range(sum(sizes)))
    assert set(order[sum(sizes) :]) <= {NO_SAMPLE_INDEX}


def test_epochs_differ_and_come_again():
    sampler = EpochSampler([100], [1.0], 0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert list(EpochSampler([100], [1.0], 1)) != orders[0]


def test_weights_give_shares_and_go_on_where_they_stopped():
    sampler = EpochSampler([40, 10, 20], [0.25, 2.5, 1.0], 0)
    assert sampler.samples == 10 + 25 + 20
    seen: Counter[int] = Counter()
    for epoch in range(4):
        order = sampler.order(epoch)
        light = [index for index in order if index < 40]
        assert len(light) == len(set(light)) == 10
        assert set(Counter(index for index in order if 40 <= index < 50).values()) == {2, 3}
        seen.update(light)
    assert set(seen.values()) == {1}, "four epochs of a quarter see each record once"
    assert len(seen) == 40


def test_a_source_of_next_to_no_weight_still_gives_a_record_an_epoch():
    sampler = EpochSampler([40, 10], [1e-9, 1.0], 0)
    light = [int(index) for epoch in range(40) for index in sampler.order(epoch) if index < 40]
    assert sampler.samples == 11
    assert sorted(light) == list(range(40)), "one after the other, none twice before all came"


def as_accelerate_deals(sampler: EpochSampler, batch: int, world: int, rank: int):
    from accelerate.data_loader import BatchSamplerShard

    return BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), world, rank)


def as_the_trainer_deals(sampler: EpochSampler, batch: int, world: int, rank: int):
    return ShareOfBatches(sampler, rank, world, batch)


DEALS = [as_accelerate_deals, as_the_trainer_deals]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """103 records of two sources, which no count of ranks and workers divides."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = kit.text_records(60), [{**row, "id": f"s{n}"} for n, row in enumerate(kit.text_records(43))]
    paths = [kit.write_json(folder / "a.json", rows[0]), kit.write_json(folder / "b.jsonl", rows[1], lines=True)]
    return kit.dataset(folder, *paths)


class Ids:
    """The data set with only the ids decoded: what came through the workers, and how often."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        item = self.data[index]
        return "" if item is NO_SAMPLE else self.data.sample(index).id


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 4)])
@pytest.mark.parametrize("deal", DEALS)
def test_ranks_and_workers_together_see_every_record_once(mixed, world, workers, deal):
    batch = 4
    for epoch in range(2):
        seen: list[str] = []
        batches = set()
        for rank in range(world):
            sampler = mixed.sampler(global_batch=batch * world)
            sampler.set_epoch(epoch)
            loader = DataLoader(
                Ids(mixed), batch_sampler=deal(sampler, batch, world, rank), collate_fn=list, num_workers=workers
            )
            found = list(loader)
            batches.add(len(found))
            seen += [name for names in found for name in names]
        assert len(batches) == 1, "every rank takes the same number of steps"
        names = [name for name in seen if name]
        assert sorted(names) == sorted([f"r{n}" for n in range(60)] + [f"s{n}" for n in range(43)])
        assert len(seen) - len(names) < batch * world


@pytest.mark.parametrize("deal", DEALS)
def test_a_run_resumed_in_mid_epoch_sees_exactly_the_rest(mixed, deal):
    """As the Trainer does it: `skip_first_batches` on the loader of the epoch it stopped in."""
    from accelerate import skip_first_batches

    world, batch, stopped = 2, 4, 7
    first: list[str] = []
    rest: list[str] = []
    for rank in range(world):
        for target, skip in ((first, 0), (rest, stopped)):
            sampler = mixed.sampler(global_batch=batch * world)
            sampler.set_epoch(3)
            loader = DataLoader(Ids(mixed), batch_sampler=deal(sampler, batch, world, rank), collate_fn=list)
            found = list(skip_first_batches(loader, skip) if skip else loader)
            target += [name for names in (found if skip else found[:stopped]) for name in names if name]
    assert len(first) == stopped * world * batch
    assert sorted(first + rest) == sorted(mixed.sample(index).id for index in range(len(mixed)))


@pytest.mark.parametrize("deal", DEALS)
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(mixed, deal):
    steps = {}
    for world, batch in ((1, 8), (2, 4), (4, 2)):
        per_rank = [list(deal(mixed.sampler(8), batch, world, rank)) for rank in range(world)]
        steps[world] = [sorted(index for batches in step for index in batches) for step in zip(*per_rank, strict=True)]
    assert steps[1] == steps[2] == steps[4]


def test_real_batches_through_workers(mixed):
    """Not ids alone: whole items, made in forked workers, are those made here."""
    sampler = mixed.sampler(8)
    order = list(sampler)
    batches = list(DataLoader(mixed, batch_size=8, sampler=sampler, collate_fn=mixed.collator(), num_workers=2))
    assert torch.equal(batches[0]["input_ids"], mixed.collator()([mixed[index] for index in order[:8]])["input_ids"])
    assert len(batches) == len(order) // 8


def test_positions_are_found_across_sources(mixed):
    source, position = mixed.locate(60)
    assert (source.label, position) == ("b", 0)
    for index in (-2, 103):
        with pytest.raises(IndexError):
            mixed[index]
