"""Trains each family's projector for a few steps, plainly or under ZeRO-3, and writes what happened as JSON.

    python -m tests.families.zero3 OUT plain CASE …           one process, both ranks' rows in turn
    torchrun --nproc_per_node 2 -m tests.families.zero3 OUT zero3 CASE …

Rank 0's row has one image; rank 1's has two, of other sizes, and a second row without any.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch

from tests.families.case import Case, cases, make_image
from visionzip import attach, attached
from visionzip.fingerprint import gathered

STEPS = 3
RATE = 1e-2


def batch(case: Case, processor: Any, rank: int) -> dict[str, Any]:
    if rank == 0:
        texts, rows = [case.prompt()], [[make_image(0, case.sizes[0])]]
    else:
        texts = [case.prompt(2, question="how many"), case.prompt(0)]
        rows = [[make_image(1, case.sizes[1]), make_image(2, case.sizes[0])], []]
    inputs = case.process(processor, texts, rows)
    inputs["labels"] = inputs["input_ids"].masked_fill(
        inputs["input_ids"] >= 19, -100
    )  # placeholders come after the words
    return inputs


def prepared(case: Case) -> tuple[Any, Any, list[torch.nn.Parameter]]:
    model, processor = case.model(), case.processor()
    attach(model, processor, case.budget)
    model.requires_grad_(False)
    model.config.use_cache = False
    trained = []
    for name in attached(model).projector_names:
        trained += list(model.get_submodule(name).requires_grad_(True).parameters())
    return model, processor, trained


def checksum(parameters: Any) -> int:
    """Of all values, bit for bit."""
    total = 0
    for parameter in parameters:
        with gathered([parameter]):
            total = zlib.crc32(parameter.detach().contiguous().numpy().tobytes(), total)
    return total


def values(parameters: list[torch.nn.Parameter]) -> list[float]:
    """A few of each parameter."""
    found = []
    for parameter in parameters:
        with gathered([parameter]):
            found += parameter.detach().flatten()[:: max(1, parameter.numel() // 5)].tolist()
    return found


def plain(case: Case) -> dict[str, Any]:
    model, processor, trained = prepared(case)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    batches, before = [batch(case, processor, rank) for rank in range(2)], checksum(frozen)
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE), []
    for _ in range(STEPS):
        found = [model(**inputs).loss for inputs in batches]
        (sum(found) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in found])
    return {"losses": losses, "values": values(trained), "frozen_kept": checksum(frozen) == before}


def zero3(case: Case, rank: int) -> dict[str, Any]:
    import deepspeed

    model, processor, trained = prepared(case)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    inputs, before = batch(case, processor, rank), checksum(frozen)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed clips at 1 where nothing is said
        },
    )
    losses = []
    for _ in range(STEPS):
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        everyone = [torch.zeros(1) for _ in range(2)]
        torch.distributed.all_gather(everyone, loss.detach().reshape(1))
        losses.append([one.item() for one in everyone])
    result = {"losses": losses, "values": values(trained), "frozen_kept": checksum(frozen) == before}
    result["partitioned"] = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    engine.destroy()
    return result


def main() -> None:
    out, mode, *names = sys.argv[1:]
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    if mode == "zero3":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for case in cases():
        if case.name in names:
            result = zero3(case, rank) if mode == "zero3" else plain(case)
            if rank == 0:
                Path(out, f"{mode}-{case.name}.json").write_text(json.dumps(result))
    if mode == "zero3":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
