"""Every family's projector trains under ZeRO-3 with two processes, as it does in one process without DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.case import Case
from tests.families.test_properties import CASES, every_family
from train.launch import free_port

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch for all families; ``{plain,zero3}-<family>.json``."""
    out = tmp_path_factory.mktemp("zero3")
    names = [case.name for case in CASES if "zero3" not in case.exempt]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    script = ["-m", "tests.families.zero3", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for command in ([sys.executable, *script, "plain", *names], [*launcher, *script, "zero3", *names]):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        (out / "log.txt").open("a").write(
            done.stdout + done.stderr
        )  # a family that failed has no result: its own test says so
    return out


@pytest.mark.launch
@every_family("zero3")
def test_zero3(case: Case, trained: Path) -> None:
    """Same losses on each rank, same projector, nothing frozen moved, every parameter sharded."""
    plain, zero3 = (result(trained, mode, case) for mode in ("plain", "zero3"))
    assert zero3["partitioned"]
    assert plain["frozen_kept"]
    assert zero3["frozen_kept"]
    torch.testing.assert_close(torch.tensor(zero3["losses"]), torch.tensor(plain["losses"]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(zero3["values"]), torch.tensor(plain["values"]), rtol=1e-3, atol=1e-3)
    first, last = (sum(zero3["losses"][step]) for step in (0, -1))
    assert last < first


def result(trained: Path, mode: str, case: Case) -> dict[str, Any]:
    path = trained / f"{mode}-{case.name}.json"
    assert path.exists(), (trained / "log.txt").read_text()[-3000:]
    return json.loads(path.read_text())
