"""Score → select → merge: VisionZip in pure tensor functions that know no model.

Shapes: ``B`` images (or tiles, or frames), ``N`` tokens of the encoder with CLS, ``D`` hidden size, ``K`` kept tokens =
dominant + contextual. Source: arXiv 2412.04467, section 3; where paper and authors' code disagree (the merge adds, the
pseudo-code averages) the code is followed, because it produced the published numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionzip.config import ZipConfig
from visionzip.intercept import Scoped
from visionzip.merges import MERGES, Groups
from visionzip.selectors import SELECTORS, Features
from visionzip.selectors.pooled import pool

DROPPED = -1


@dataclass(frozen=True)
class Compressed:
    """The tokens that are left of ``B`` images, and where each one came from.

    Attributes:
        tokens: ``(B, K, D)``: CLS, dominant patches in raster order, contextual tokens.
        kept: ``(B, dominant)`` int64: their places among the encoder's tokens, ascending; 0 is CLS where there is one.
        targets: ``(B, contextual)`` int64: the places of the tokens that others were merged into.
        slots: ``(B, N)`` int64: for every token of the encoder the place in `tokens` it went to, or ``DROPPED``.
    """

    tokens: Tensor
    kept: Tensor
    targets: Tensor
    slots: Tensor


Listener = Callable[[Features, Compressed], None]
_listener: Scoped[Listener] = Scoped("visionzip_listener")


def listening(listener: Listener) -> AbstractContextManager[None]:
    """Inside, `listener` sees what goes into and comes out of every `compress` of this thread (`visionzip.analysis.trace`).

    Here rather than in a model's family: whatever a family does before and after, its tokens are chosen here.
    """
    return _listener.set(listener)


def listened() -> bool:
    """Somebody wants to see the scores, also of a selector that does without."""
    return not torch.compiler.is_compiling() and _listener.get() is not None  # dynamo can't trace a ContextVar


def compress(
    features: Features, dominant: int, contextual: int, *, selector: str = "visionzip", merge: str = "add"
) -> Compressed:
    """Keep `dominant` tokens as they are and merge the others into `contextual` ones.

    Args:
        features: one layer of an encoder, ``N`` tokens of ``B`` images.
        dominant: tokens kept, CLS included if there is one.
        contextual: tokens the rest is merged into; with 0 the rest is dropped.

    Raises:
        ValueError: when the budget is larger than ``N``.
    """
    with without_autocast(features.hidden_states.device):
        result = _compress(features, dominant, contextual, selector, merge)
    listener = _listener.get() if listened() else None
    if listener is not None:
        listener(features, result)
    return result


def compress_to_budget(features: Features, config: ZipConfig, budget: tuple[int, int] | None = None) -> Compressed:
    """`compress` with `config`'s selector and merge, and with its budget unless another ``(dominant, contextual)`` is given."""
    if budget is None:
        budget = config.resolve(features.hidden_states.shape[1], reserved=features.cls)
    return compress(features, *budget, selector=config.selector, merge=config.merge)


def rank_tokens(features: Features, config: ZipConfig, dominant: int) -> tuple[Tensor, Tensor]:
    """The `dominant` tokens that are kept as they are, in order of rank, CLS first: tokens ``(B, dominant, D)`` and their places
    among the encoder's ``(B, dominant)``. Those of a smaller budget are the beginning; `cut_ranked` takes it.

    Raises:
        ValueError: for a selector that is not nested.
    """
    entry = SELECTORS[config.selector]
    if not entry.nested:
        raise ValueError(f"the selector {config.selector} is not nested: its order depends on the budget")
    with without_autocast(features.hidden_states.device):
        places = F.pad(entry.rank(features, dominant - features.cls) + features.cls, (features.cls, 0))
    return take(features.hidden_states, places), places


def cut_ranked(tokens: Tensor, places: Tensor, dominant: int) -> Tensor:
    """One image's part of `rank_tokens`, ``(R, …)`` and ``(R,)`` → ``(dominant, …)`` in raster order, as `compress` keeps them."""
    return tokens[:dominant][places[:dominant].argsort()]


def _compress(features: Features, dominant: int, contextual: int, selector: str, merge: str) -> Compressed:
    batch, total = features.hidden_states.shape[:2]
    if not features.cls <= dominant <= total or not 0 <= contextual <= total - dominant:
        raise ValueError(f"dominant={dominant} + contextual={contextual} of {total} tokens can't be kept")
    if SELECTORS[selector].pools:
        return _pool(features, dominant, contextual, selector)
    patches = SELECTORS[selector].select(features, dominant - features.cls)
    kept = F.pad(patches + features.cls, (features.cls, 0))  # CLS is token 0
    rest = complement(kept, total)  # (B, R)

    slots = torch.full((batch, total), DROPPED, device=kept.device)
    slots.scatter_(1, kept, torch.arange(dominant, device=kept.device).expand(batch, -1))
    tokens = take(features.hidden_states, kept)
    if contextual == 0:
        return Compressed(tokens, kept, rest[:, :0], slots)

    groups = group_rest(features.metric, rest, contextual)
    how = MERGES[merge]
    merged = how.combine(take(features.hidden_states, rest), groups)
    if how.uses_rest:
        slots.scatter_(1, rest, groups.group + dominant)
    else:
        slots.scatter_(1, rest[:, groups.targets], groups.group[:, groups.targets] + dominant)
    return Compressed(torch.cat((tokens, merged), dim=1), kept, rest[:, groups.targets], slots)


def _pool(features: Features, dominant: int, contextual: int, selector: str) -> Compressed:
    """The cells of a control in place of tokens; each stands where its middle patch does, and CLS is dropped."""
    count, cls = dominant + contextual, features.cls
    patches = features.hidden_states[:, cls:]
    if count > patches.shape[1]:
        raise ValueError(f"{selector} makes at most one token per patch: {count} requested, {patches.shape[1]} patches")
    tokens, cell = pool(patches, count)
    middles = SELECTORS[selector].select(features, count) + cls
    slots = F.pad(cell.expand(len(tokens), -1), (cls, 0), value=DROPPED)
    return Compressed(tokens, middles[:, :dominant], middles[:, dominant:], slots)


def group_rest(metric: Tensor, rest: Tensor, contextual: int) -> Groups:
    """Keys ``(B, N, d)`` and places of the tokens that are not kept ``(B, R)`` → the groups they are merged in."""
    targets = contextual_targets(rest.shape[1], contextual, device=rest.device)
    keys = take(metric, rest)
    return Groups(targets, assign(keys, targets), keys)


def merge_weights(features: Features, chosen: Compressed, merge: str) -> Tensor:
    """``(B, N)`` float32: how much of each token is in the one that it went to (`Compressed.slots`); 1 for a kept one.

    For families that merge what their projector makes of the tokens, later and with gradient.
    """
    ones = torch.ones(chosen.slots.shape, device=chosen.slots.device)
    if not chosen.targets.shape[1]:
        return ones
    rest = complement(chosen.kept, chosen.slots.shape[1])
    with without_autocast(rest.device):
        weights = MERGES[merge].weights(group_rest(features.metric, rest, chosen.targets.shape[1]))
    return ones.scatter(1, rest, weights)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, products are taken in the precision of what they are given, whatever surrounds: a trainer's ``bf16=True`` would take
    those that choose and merge in bfloat16, and images would keep other tokens there than when a cache was written."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def part(images: Compressed, start: int, stop: int) -> Compressed:
    """Images `start` … `stop` of a batch."""
    return Compressed(
        images.tokens[start:stop], images.kept[start:stop], images.targets[start:stop], images.slots[start:stop]
    )


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """``(B, N, D)`` and ``(B, K)`` → ``(B, K, D)``."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def complement(places: Tensor, total: int) -> Tensor:
    """Of `total` tokens those that are not in `places` ``(B, K)``, ascending: ``(B, total - K)``."""
    left = torch.ones(places.shape[0], total, dtype=torch.bool, device=places.device).scatter_(1, places, False)
    # A stable sort rather than nonzero(): its shape is known beforehand, so it neither waits for a GPU nor breaks a graph.
    return left.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : total - places.shape[1]]


def contextual_targets(rest: int, contextual: int, device: torch.device) -> Tensor:
    """Every ``max(1, rest // contextual)``-th of the remaining tokens in raster order, the first `contextual` of them."""
    return torch.arange(contextual, device=device) * max(1, rest // contextual)


def assign(metric: Tensor, targets: Tensor) -> Tensor:
    """Each of ``R`` remaining tokens goes to the target whose key is most similar (cosine); a target goes to itself.

    Shapes: metric ``(B, R, d)``, targets ``(T,)`` → ``(B, R)`` in ``[0, T)``. Float32: a tie broken by rounding would
    move a token from one group to another.
    """
    metric = F.normalize(metric.float(), dim=-1)
    group = (metric @ metric[:, targets].transpose(1, 2)).argmax(dim=-1)
    group[:, targets] = torch.arange(len(targets), device=targets.device)
    return group
