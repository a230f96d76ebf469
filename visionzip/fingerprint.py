"""What a projector was trained against, in a form that survives a change of dtype or quantisation.

A hash of the weights would call a model loaded in float16 and in bfloat16 two different ones. Here a few values of evenly
spread parameters are kept and compared within half-precision rounding; a linear layer stored in 4 or 8 bit has no values to
compare and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PARAMETERS = 48  # sampled of each half
VALUES = 4  # of each of them
TOLERANCE = 2**-6  # relative; bfloat16 keeps 8 bits, and a value may have been rounded twice

Fingerprint = dict[str, dict[str, dict[str, list]]]

_REMEMBERED = "_visionzip_fingerprint"


def fingerprint(model: nn.Module, parts: dict[str, str]) -> Fingerprint:
    """``{part: {parameter: {"shape": [...], "values": [...]}}}`` for the submodules named in `parts` (part → dotted name).

    Adapters are passed over: this says which base they sit on. A module whose weights were not loaded (`remember_fingerprint`) is what it was
    said to be.
    """
    found = {}
    for part, name in parts.items():
        module = model.get_submodule(name)
        known = module.__dict__.get(_REMEMBERED)
        found[part] = known if known is not None else _sample(_base_parameters(module))
    return found


def remember_fingerprint(module: nn.Module, known: dict[str, dict[str, list]]) -> None:
    """Let `module`, which has no weights here, have this fingerprint: that of the weights its outputs were computed with."""
    module.__dict__[_REMEMBERED] = known


def fingerprint_of_state(state: Mapping[str, Tensor], parts: dict[str, str]) -> Fingerprint:
    """The same of weights that are in no module: `state` by names in the plain model."""
    return {
        part: _sample({key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")})
        for part, name in parts.items()
    }


def check_fingerprint(stored: Fingerprint) -> Fingerprint:
    """`stored` if `differences` can read it.

    Raises:
        ValueError: naming the entry that is incomplete.
    """
    for part, names in stored.items():
        for name, entry in names.items():
            shape, values = entry.get("shape", [None]), entry.get("values", [None])
            numbers = all(isinstance(n, int) for n in shape) and all(isinstance(v, int | float) for v in values)
            if not numbers or len(values) not in (0, VALUES):
                raise ValueError(f"the entry for {part}: {name} is incomplete")
    return stored


def differences(here: Fingerprint, stored: Fingerprint) -> list[str]:
    """What differs, in words; empty where both are of the same model."""
    found = []
    for part in sorted(stored.keys() | here.keys()):
        ours, theirs = here.get(part, {}), stored.get(part, {})
        common = [name for name in theirs if name in ours]
        if not common:
            found.append(f"{part}: no parameter in common")
            continue
        for name in common:
            mine, other = ours[name], theirs[name]
            if mine["shape"] != other["shape"]:
                found.append(f"{part}: {name} has shape {mine['shape']} here and {other['shape']} there")
                break
            known = bool(mine["values"] and other["values"])
            if known and not all(_close(a, b) for a, b in zip(mine["values"], other["values"], strict=True)):
                found.append(f"{part}: {name} has values {mine['values']} here and {other['values']} there")
                break
    return found


def short_digest(stored: dict[str, Any]) -> str:
    """Eight hex digits to tell fingerprints apart by eye; equality is `differences`' business."""
    shapes = {part: {name: entry["shape"] for name, entry in names.items()} for part, names in stored.items()}
    rounded = {
        part: {name: [f"{value:.1e}" for value in entry["values"]] for name, entry in names.items()}
        for part, names in stored.items()
    }
    return hashlib.sha256(json.dumps([shapes, rounded], sort_keys=True).encode()).hexdigest()[:8]


@contextmanager
def gathered(parameters: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Whole parameters inside the block, also under ZeRO-3, which leaves each rank with a shard. All ranks must enter.

    With `write`, what rank 0 wrote inside is what all ranks have afterwards.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    with sys.modules["deepspeed"].zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def _base_parameters(module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {name.replace(".base_layer", ""): value for name, value in named if ".lora_" not in name}


def _sample(named: Mapping[str, Tensor]) -> dict[str, dict[str, list]]:
    names = sorted(name for name, value in named.items() if value.is_floating_point())
    step = max(1, len(names) // PARAMETERS)
    result: dict[str, dict[str, list]] = {}
    for name in names[::step][:PARAMETERS]:
        with gathered([named[name]]):
            result[name] = {"shape": list(named[name].shape), "values": _values(named[name].detach())}
    return result


def _values(parameter: Tensor) -> list[float]:
    """A few values; none of a parameter that a device map offloaded, whose shape alone is compared."""
    if parameter.is_meta:
        return []
    flat = parameter.reshape(-1)
    places = [(index * flat.numel()) // VALUES + flat.numel() // (2 * VALUES) for index in range(VALUES)]
    return (
        [round(flat[min(place, flat.numel() - 1)].to(torch.float32).item(), 7) for place in places] if len(flat) else []
    )


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + 1e-6
