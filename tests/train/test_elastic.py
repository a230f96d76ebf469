"""A run whose images have budgets of their own is one run, however it is carried out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from data.commands.cache import main as make_cache
from tests.train.test_resume import far, saving
from tests.train.test_survival import steps_done, wait_for
from tests.train.workspace import Ranks, config_of, equal, losses, projector, write_config
from train.config import ConfigError, parse_config

BUDGETS = {"dominant": 5, "contextual": 2, "budgets": {"totals": [4, 7, 12], "density": [0.5, 0.3, 0.2]}}
RANGE = {"dominant": 5, "contextual": 0, "budgets": {"least": 3, "most": 12}}


@pytest.mark.launch
def test_the_same_losses_however_it_is_carried_out(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """From pixels and from a cache, packed and padded, on one rank and two, accumulated or not, whole and sharded."""
    tokens = str(tmp_path / "tokens")
    runs: dict[str, dict[str, Any]] = {
        "pixels": {},
        "padded": {"data__batching": "random", "train__share_prefix": False},
        "accumulated": {"data__cache": tokens, "trainer__per_device_train_batch_size": 1},
        "zero3": {"trainer__deepspeed": "zero3"},
        "off": {"trainer__deepspeed": "off"},
        "cached": {"data__cache": tokens},
    }
    configs = {name: config_of(workspace, tmp_path / name, zip=BUDGETS, **changes) for name, changes in runs.items()}
    assert make_cache(["--config", str(write_config(configs["cached"])), "--workers", "0"]) == 0
    ranks.run(*(config for name, config in configs.items() if name != "off"))
    ranks.run(configs["off"], world=1)
    for name in runs:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "pixels"), rel=1e-5), name
        assert far(projector(tmp_path / "pixels"), projector(tmp_path / name)) < 1e-4, name
    fixed = config_of(workspace, tmp_path / "fixed", zip={key: BUDGETS[key] for key in ("dominant", "contextual")})
    ranks.run(fixed)
    assert losses(tmp_path / "fixed") != pytest.approx(losses(tmp_path / "pixels"), rel=1e-3)


@pytest.mark.launch
def test_a_range_from_one_ranked_sequence(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    pixels = config_of(workspace, tmp_path / "pixels", zip=RANGE, trainer__deepspeed="off")
    cached = config_of(
        workspace, tmp_path / "cached", zip=RANGE, trainer__deepspeed="off", data__cache=str(tmp_path / "t")
    )
    assert make_cache(["--config", str(write_config(cached)), "--workers", "0"]) == 0
    ranks.run(pixels, cached, world=1)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-5)


@pytest.mark.launch
def test_a_resumed_run_draws_what_the_interrupted_one_would_have(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    whole = saving(workspace, tmp_path / "whole", zip=BUDGETS, train__budgets_per_sample=2)
    again = {
        f"from_{step}": saving(
            workspace,
            tmp_path / f"from_{step}",
            zip=BUDGETS,
            train__budgets_per_sample=2,
            trainer__resume=f"{tmp_path}/whole/checkpoint-{step}",
        )
        for step in (2, 4)
    }
    ranks.run(whole, *again.values())
    for name in again:
        assert equal(projector(tmp_path / name), projector(tmp_path / "whole")), name
    one = saving(workspace, tmp_path / "one", zip=BUDGETS, train__budgets_per_sample=2,
                 trainer__resume=f"{tmp_path}/whole/checkpoint-2")  # fmt: skip
    ranks.run(one, world=1)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "whole")[2:], rel=1e-5)


@pytest.mark.launch
@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_run_ends_with_the_same_projector(workspace: Path, ranks: Ranks, tmp_path: Path, cached: bool) -> None:
    """SIGKILL to both ranks between two checkpoints, from pixels and from the token cache."""
    plan = {"zip": BUDGETS, "trainer__max_steps": 20, "data__cache": str(tmp_path / "tokens") if cached else None}
    never, killed = (saving(workspace, tmp_path / name, **plan) for name in ("never", "killed"))
    if cached:
        assert make_cache(["--config", str(write_config(never)), "--workers", "0"]) == 0
    ranks.run(never)
    pids = ranks.start(killed, slow_writes=0.02, grace=0.0)
    wait_for(lambda: steps_done(tmp_path / "killed") >= 3)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL] * 2
    assert 3 <= steps_done(tmp_path / "killed") < 20
    assert "resuming from" in ranks.run(killed)
    assert equal(projector(tmp_path / "killed"), projector(tmp_path / "never"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "never")


@pytest.mark.launch
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_several_budgets_of_a_sample_packed_or_not(
    workspace: Path, ranks: Ranks, tmp_path: Path, positions: str
) -> None:
    runs = {
        "packed": {},
        "padded": {"data__batching": "random"},
        "unshared": {"train__share_prefix": False},
        "cached": {"data__cache": str(tmp_path / "tokens")},
    }
    configs = {
        name: config_of(
            workspace, tmp_path / name, zip=BUDGETS | {"positions": positions}, train__budgets_per_sample=2, **changes
        )
        for name, changes in runs.items()
    }
    assert make_cache(["--config", str(write_config(configs["cached"])), "--workers", "0"]) == 0
    ranks.run(*configs.values())
    for name in runs:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "packed"), rel=1e-5), name


def test_what_is_not_possible_is_said_at_once(workspace: Path, tmp_path: Path, capsys) -> None:
    one = config_of(workspace, tmp_path / "one", train__budgets_per_sample=2)
    with pytest.raises(ConfigError, match="there is only one budget; list several"):
        parse_config(one)
    held_out = {"sources": one["data"]["sources"], "cache": "tokens"}
    other = {**BUDGETS, "dominant": 6}
    with pytest.raises(ConfigError, match=r"eval\.cache has the tokens of zip\.budgets, but not of .* = 6 \+ 2"):
        parse_config(config_of(workspace, tmp_path / "two", zip=other, eval=held_out))
    tokens = str(tmp_path / "tokens")
    config = config_of(workspace, tmp_path / "three", zip={**RANGE, "selector": "uniform"}, data__cache=tokens)
    assert make_cache(["--config", str(write_config(config)), "--workers", "0"]) == 2
    assert "the selector uniform is not nested" in capsys.readouterr().err
