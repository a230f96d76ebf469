"""Each selector against a slow version that follows the words of its docstring, and the promises all of them make."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionzip.selectors import SELECTORS, Features


def cosine(a, b):
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def slow_visionzip(tokens, scores, keep):
    return sorted(range(len(tokens)), key=lambda i: (-scores[i], i))[:keep]


def slow_divprune(tokens, scores, keep):
    chosen = []
    while len(chosen) < keep:
        best, best_distance = None, None
        for i in range(len(tokens)):
            others = chosen or [j for j in range(len(tokens)) if j != i]
            distance = min((1 - cosine(tokens[i], tokens[j]) for j in others), default=float("inf"))
            if i not in chosen and (best is None or distance > best_distance):
                best, best_distance = i, distance
        chosen.append(best)
    return chosen


def slow_vispruner(tokens, scores, keep):
    order = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))
    important = order[: round(keep / 2)]
    left = sorted(order[len(important) :])
    while len(left) > keep - len(important):
        a, b = left[::2], left[1::2]
        gone = min(8, len(left) - (keep - len(important)), len(a))
        if not b:
            left = []
            break
        likeness = {i: max(cosine(tokens[i], tokens[j]) for j in b) for i in a}
        a = sorted(a, key=lambda i: likeness[i])[: len(a) - gone]
        left = sorted(a + b)
    return important + left


def slow_cover(tokens, weights, keep):
    return slow_facility([[min(max(cosine(a, b), 0.0), 1.0) for b in tokens] for a in tokens], weights, keep)


def slow_mmtok(tokens, scores, keep):
    raised = [[math.exp(cosine(a, b) / 0.2) for b in tokens] for a in tokens]
    return slow_facility([[value / sum(row) for value in row] for row in raised], [1.0] * len(tokens), keep)


def slow_dpp(tokens, relevance, keep):
    """By determinants of the kernel, as long as there is one that is not 0."""
    kernel = torch.tensor(
        [[float(r * s) * cosine(a, b) for b, s in zip(tokens, relevance, strict=True)]
         for a, r in zip(tokens, relevance, strict=True)], dtype=torch.float64,
    )  # fmt: skip
    chosen = []
    while len(chosen) < keep:
        volume = torch.linalg.det(kernel[chosen][:, chosen]) if chosen else 1.0
        gains = {}
        for i in (i for i in range(len(tokens)) if i not in chosen):
            some = [*chosen, i]
            gains[i] = round(1e4 * float(torch.linalg.det(kernel[some][:, some]) / volume)) if volume > 1e-12 else 0
        if max(gains.values()) <= 0:  # what is chosen spans all
            return chosen + sorted(gains, key=lambda i: (-relevance[i], i))[: keep - len(chosen)]
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
    return chosen


def slow_cdpruner(tokens, scores, keep):
    spread = max(max(scores) - min(scores), 1e-12)
    return slow_dpp(tokens, [(score - min(scores)) / spread for score in scores], keep)


def slow_facility(likeness, weights, keep):
    """Rows are covered by columns."""
    mean = max(sum(weights) / len(weights), 1e-12)
    weights = [w / mean for w in weights]
    chosen = []
    while len(chosen) < keep:

        def value(subset):
            return sum(w * max((likeness[i][j] for j in subset), default=0.0) for i, w in enumerate(weights))

        rest = [j for j in range(len(weights)) if j not in chosen]
        chosen.append(
            max(rest, key=lambda j: round(1e4 * (value([*chosen, j]) - value(chosen))))
        )  # the first of equals
    return chosen


SLOW = {
    "visionzip": slow_visionzip,
    "divprune": slow_divprune,
    "vispruner": slow_vispruner,
    "coverage": lambda tokens, scores, keep: slow_cover(tokens, [1.0] * len(tokens), keep),
    "focus": lambda tokens, scores, keep: slow_cover(tokens, scores, keep),
    "mmtok": slow_mmtok,
    "dpp": lambda tokens, scores, keep: slow_dpp(tokens, [1.0] * len(tokens), keep),
    "cdpruner": slow_cdpruner,
}


def features_of(seed, batch, total, has_cls, width=6):
    generator = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(batch, total, width, generator=generator, dtype=torch.float64).float(),
        torch.randn(batch, total, 4, generator=generator),
        torch.rand(batch, total, generator=generator),
        has_cls,
    )


@st.composite
def problems(draw):
    total = draw(st.integers(2, 26))
    has_cls = draw(st.booleans())
    keep = draw(st.integers(0, total - has_cls))
    return features_of(draw(st.integers(0, 10**6)), draw(st.integers(1, 3)), total, has_cls), keep


@pytest.mark.parametrize("name", SLOW)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems())
def test_equals_slow_version(name, problem):
    features, keep = problem
    fast = SELECTORS[name].select(features, keep)
    for row, hidden, scores in zip(fast, features.hidden_states, features.scores, strict=True):
        expected = SLOW[name](hidden[features.cls :].double(), scores[features.cls :].double().tolist(), keep)
        assert row.tolist() == sorted(expected)


def test_every_selector_that_is_no_baseline_has_a_slow_version():
    assert {name for name, entry in SELECTORS if not entry.pools} - {"random", "uniform"} == set(SLOW)


@pytest.mark.parametrize("name", SELECTORS.names())
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems())
def test_promises(name, problem):
    """Ascending, distinct, in range; the same again; the same for an image alone as in a batch; int64."""
    features, keep = problem
    chosen = SELECTORS[name].select(features, keep)
    patches = features.hidden_states.shape[1] - features.cls
    assert chosen.shape == (len(features.hidden_states), keep)
    assert chosen.dtype == torch.int64
    assert bool((chosen.diff(dim=1) > 0).all())
    assert chosen.numel() == 0 or (chosen.min() >= 0 and chosen.max() < patches)
    assert torch.equal(chosen, SELECTORS[name].select(features, keep))
    for i in range(len(chosen)):
        part = slice(i, i + 1)
        alone = Features(features.hidden_states[part], features.metric[part], features.scores[part], features.has_cls)
        assert torch.equal(SELECTORS[name].select(alone, keep)[0], chosen[i])


@pytest.mark.parametrize("name", [name for name, entry in SELECTORS if entry.nested])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems(), fewer=st.integers(0, 26))
def test_a_smaller_budget_of_a_nested_selector_is_the_beginning_of_a_larger_one(name, problem, fewer):
    features, keep = problem
    smaller = min(fewer, keep)
    assert torch.equal(SELECTORS[name].rank(features, smaller), SELECTORS[name].rank(features, keep)[:, :smaller])


@pytest.mark.parametrize("name", [name for name, entry in SELECTORS if not entry.needs_scores])
def test_no_attention_where_none_is_needed(name):
    features = features_of(0, 2, 17, True)
    without = Features(features.hidden_states, features.metric, None, True)
    assert torch.equal(SELECTORS[name].select(features, 5), SELECTORS[name].select(without, 5))


def test_random_draws_every_patch_about_equally_often_and_differs_by_image():
    features = features_of(3, 4000, 17, True)
    chosen = SELECTORS["random"].select(features, 4)
    counts = torch.bincount(chosen.flatten(), minlength=16) / len(chosen)
    assert bool(((counts - 0.25).abs() < 0.03).all())  # four standard deviations of 4000 draws
    assert len({tuple(row.tolist()) for row in chosen}) > 1500  # of C(16, 4) = 1820


def test_uniform_is_even():
    features = features_of(0, 1, 17, True)
    assert SELECTORS["uniform"].select(features, 4).tolist() == [[2, 6, 10, 14]]
    assert SELECTORS["uniform"].select(features, 16).tolist() == [list(range(16))]


def test_duplicates_are_what_diverse_selectors_leave_out():
    """Ten copies of the highest-scoring patch and a few others: attention takes copies, the others do not."""
    tokens = torch.eye(8)
    tokens = torch.cat((tokens[:1].repeat(10, 1), tokens[1:]))[None]  # places 0–9 alike, 10–16 all different
    scores = torch.cat((torch.full((10,), 1.0), torch.full((7,), 0.5)))[None]
    features = Features(tokens, tokens, scores, False)
    copies = {name: int((entry.select(features, 8) < 10).sum()) for name, entry in SELECTORS}
    assert copies["visionzip"] == 8
    assert copies["divprune"] == copies["coverage"] == copies["focus"] == copies["dpp"] == 1
