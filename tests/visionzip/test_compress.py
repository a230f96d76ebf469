"""compress.py against the authors' outputs and against a slow version that can be read at a glance."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from tests.tiny import REFERENCE
from visionzip.compress import DROPPED, compress, compress_to_budget, contextual_targets, merge_weights
from visionzip.config import ZipConfig
from visionzip.encoders import encoder_for
from visionzip.merges import MERGES, merge
from visionzip.merges.base import CHUNK
from visionzip.selectors import SELECTORS, Features

GOLDEN = sorted(path.name for path in REFERENCE.glob("clip_*"))


def slow(features: Features, dominant: int, contextual: int, merge: str):
    """VISIONZIP.md section 1, step by step, one image and one token at a time."""
    outputs, kept_all, targets_all, slots_all = [], [], [], []
    first = 1 if features.has_cls else 0
    for hidden, metric, scores in zip(features.hidden_states, features.metric, features.scores, strict=True):
        total = len(hidden)
        by_score = sorted(range(first, total), key=lambda token: (-float(scores[token]), token))
        kept = sorted(list(range(first)) + by_score[: dominant - first])
        rest = [token for token in range(total) if token not in kept]
        output = [hidden[token] for token in kept]
        slots = {token: place for place, token in enumerate(kept)}
        targets = []
        if contextual:
            step = max(1, len(rest) // contextual)
            targets = rest[::step][:contextual]
            members = {target: [] for target in targets}
            for token in rest:
                if token not in members:
                    similarity = [torch.cosine_similarity(metric[token], metric[t], dim=0) for t in targets]
                    members[targets[int(torch.stack(similarity).argmax())]].append(token)
            for place, target in enumerate(targets, start=dominant):
                merged = hidden[target]
                if members[target] and merge == "add":
                    merged = merged + torch.stack([hidden[token] for token in members[target]]).mean(dim=0)
                if merge == "mean":
                    merged = torch.stack([hidden[token] for token in [target, *members[target]]]).mean(dim=0)
                output.append(merged)
                slots[target] = place
                if merge != "none":
                    slots |= dict.fromkeys(members[target], place)
        outputs.append(torch.stack(output))
        kept_all.append(kept)
        targets_all.append(targets)
        slots_all.append([slots.get(token, DROPPED) for token in range(total)])
    return torch.stack(outputs), torch.tensor(kept_all), torch.tensor(targets_all), torch.tensor(slots_all)


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_golden(case, attention):
    """Same indices as the authors' code, tokens within 1e-5, whatever attention implementation the encoder runs."""
    folder = REFERENCE / case
    budget = json.loads((folder / "case.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    tower = CLIPVisionModel.from_pretrained(folder, attn_implementation=attention).eval()
    features = encoder_for(tower).encode(tower, expected["pixel_values"], budget["layer"])
    result = compress(features, budget["dominant"], budget["contextual"])
    assert torch.equal(result.kept, expected["kept_indices"])
    torch.testing.assert_close(result.tokens, expected["tokens"], rtol=0, atol=1e-5)


def test_golden_cases_are_there():
    assert len(GOLDEN) == 3


@st.composite
def problems(draw):
    total = draw(st.integers(1, 40))
    has_cls = draw(st.booleans()) if total > 1 else False
    dominant = draw(st.integers(1, total))
    contextual = draw(st.integers(0, total - dominant))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, width, keys = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(2, 6))
    features = Features(
        torch.randn(batch, total, width, generator=generator),
        torch.randn(batch, total, keys, generator=generator),
        # few distinct values: ties must fall the same way
        torch.randint(0, draw(st.sampled_from([2, 1000])), (batch, total), generator=generator).float(),
        has_cls,
    )
    return features, dominant, contextual, draw(st.sampled_from(["add", "mean", "none"]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_equals_slow_version(problem):
    features, dominant, contextual, merge = problem
    result = compress(features, dominant, contextual, merge=merge)
    tokens, kept, targets, slots = slow(features, dominant, contextual, merge)
    assert torch.equal(result.kept, kept)
    assert torch.equal(result.targets, targets.long().reshape(result.targets.shape))
    assert torch.equal(result.slots, slots)
    torch.testing.assert_close(result.tokens, tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rest", "contextual", "expected"),
    [
        (12, 4, [0, 3, 6, 9]),
        (13, 4, [0, 3, 6, 9]),
        (11, 4, [0, 2, 4, 6]),
        (4, 4, [0, 1, 2, 3]),
        (7, 4, [0, 1, 2, 3]),
        (9, 1, [0]),
    ],
)
def test_targets_are_evenly_spread(rest, contextual, expected):
    """Also where the number of targets divides what is left."""
    assert contextual_targets(rest, contextual, device=torch.device("cpu")).tolist() == expected


def test_an_image_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(0)
    features = Features(*(torch.randn(s, generator=generator) for s in [(5, 30, 8), (5, 30, 4), (5, 30)]), has_cls=True)
    together = compress(features, 6, 3)
    for i in range(5):
        one = Features(features.hidden_states[i : i + 1], features.metric[i : i + 1], features.scores[i : i + 1], True)
        torch.testing.assert_close(compress(one, 6, 3).tokens[0], together.tokens[i], rtol=1e-6, atol=1e-6)


def test_half_precision_tokens_keep_their_dtype_and_selection():
    generator = torch.Generator().manual_seed(1)
    hidden, metric, scores = (torch.randn(s, generator=generator) for s in [(2, 30, 8), (2, 30, 4), (2, 30)])
    exact = compress(Features(hidden.half(), metric.half(), scores, True), 6, 3)
    reference = compress(Features(hidden.half().float(), metric.half().float(), scores, True), 6, 3)
    assert exact.tokens.dtype == torch.float16
    assert torch.equal(exact.slots, reference.slots)
    torch.testing.assert_close(exact.tokens.float(), reference.tokens, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("dominant", "contextual"), [(0, 3), (31, 0), (20, 11), (1, -1)])
def test_impossible_budget(dominant, contextual):
    features = Features(torch.randn(1, 30, 4), torch.randn(1, 30, 4), torch.randn(1, 30), True)
    with pytest.raises(ValueError, match="30 tokens"):
        compress(features, dominant, contextual)


@pytest.mark.parametrize("name", MERGES.names())
def test_weights_of_a_merge_are_what_it_does(name):
    """A family that merges behind its projector gets the same tokens from the weights; more tokens than one chunk."""
    generator = torch.Generator().manual_seed(0)
    tokens = CHUNK + 30
    features = Features(
        *(torch.randn(s, generator=generator) for s in [(2, tokens, 3), (2, tokens, 4), (2, tokens)]), True
    )
    result = compress(features, 6, 9, merge=name)
    weights = merge_weights(features, result, name)
    for row in range(2):
        for place in range(15):
            mine = result.slots[row] == place
            mixed = (features.hidden_states[row, mine] * weights[row, mine, None]).sum(dim=0)
            torch.testing.assert_close(mixed, result.tokens[row, place], rtol=1e-5, atol=1e-5)


def test_a_new_merge_is_one_function_and_one_registration():
    """Nothing else has to know its name, not even for a merge behind the projector."""

    @merge("first")
    def combine(tokens, groups):
        return tokens[:, groups.targets] * 2

    try:
        features = Features(torch.randn(1, 20, 3), torch.randn(1, 20, 4), torch.randn(1, 20), True)
        config = ZipConfig(dominant=5, contextual=3, merge="first")
        result = compress_to_budget(features, config)
        assert torch.equal(result.tokens[:, 5:], 2 * features.hidden_states[:, result.targets[0]])
        assert set(merge_weights(features, result, "first")[0].unique().tolist()) == {0.0, 1.0, 2.0}
    finally:
        del MERGES._entries["first"]
    with pytest.raises(ValueError, match="no merge is called 'first'; known: add, mean, none"):
        ZipConfig(merge="first")


@pytest.mark.parametrize("selector", SELECTORS.names())
def test_the_same_tokens_where_a_trainer_switched_autocast_on(selector):
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 145, 16), (4, 145, 16), (4, 145)]
    features = Features(
        *(torch.randn(shape, generator=generator) for shape in shapes[:2]),
        torch.rand(shapes[2], generator=generator),
        True,
    )
    expected = compress(features, 20, 6, selector=selector)
    with torch.autocast("cpu", dtype=torch.float16):
        found = compress(features, 20, 6, selector=selector)
    assert torch.equal(found.slots, expected.slots)
    assert torch.equal(found.tokens, expected.tokens)
