"""The measures, against what they mean, computed by counting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionzip.analysis import redundancy


@st.composite
def shares(draw):
    weights = draw(st.lists(st.floats(0.001, 100), min_size=1, max_size=60))
    values = torch.tensor(weights, dtype=torch.float64)
    return values / values.sum()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shares(), st.sampled_from(redundancy.LEVELS))
def test_budget_is_the_least_that_holds_the_level(values, level):
    needed = int(redundancy.budget_for(values, level))
    best = sorted(values.tolist(), reverse=True)
    assert sum(best[:needed]) >= level - 2e-6
    assert sum(best[: needed - 1]) < level


def test_cumulative_and_curve_of_a_known_spread():
    values = torch.tensor([0.1, 0.4, 0.2, 0.3])
    torch.testing.assert_close(redundancy.cumulative(values), torch.tensor([0.0, 0.4, 0.7, 0.9, 1.0]))
    curve = redundancy.sample_curve(values)
    assert len(curve) == 101
    for per_cent, held in ((0, 0.0), (25, 0.4), (50, 0.7), (60, 0.78), (100, 1.0)):
        assert float(curve[per_cent]) == pytest.approx(held, abs=1e-6)


def test_effective_patches():
    assert float(redundancy.effective_patches(torch.full((8,), 1 / 8))) == pytest.approx(8)
    assert float(redundancy.effective_patches(torch.tensor([1.0, 0.0, 0.0]))) == pytest.approx(1)


def test_top_share():
    values = torch.tensor([0.5, 0.3, *[0.01] * 20])
    assert float(redundancy.top_share(values, 0.1)) == pytest.approx(0.8, abs=1e-6)


def test_agreement():
    layers = torch.tensor([[4.0, 3, 2, 1, 0, 0], [4.0, 0, 3, 0, 0, 1], [0.0, 0, 0, 5, 5, 5]])
    found = redundancy.agreement(layers, 2)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]))
