"""W&B: offline where there is no key or no network, each step once, and never a reason to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_survival import endless, steps_done, wait_for
from tests.train.wandb_stand_in import WandbStandIn
from tests.train.workspace import Ranks, config_of, environment, losses
from train.callbacks import choose_mode, has_key
from train.config import parse_config
from train.launch import free_port
from train.wandb_files import read_history, read_logged_steps

KEY = "0123456789" * 4


@pytest.fixture
def stand_in() -> Iterator[WandbStandIn]:
    server = WandbStandIn()
    yield server
    server.close()


def offline_files(output: Path) -> list[Path]:
    return sorted(output.glob("wandb/offline-run-*/*.wandb"))


def training_rows(rows: list[dict[str, Any]]) -> dict[int, float]:
    found = [(row["train/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert len(found) == len(dict(found)), "a step was logged twice"
    return dict(found)


@pytest.mark.launch
def test_a_killed_and_resumed_run_is_one_run_with_each_step_once(
    workspace: Path, ranks: Ranks, tmp_path: Path, stand_in: WandbStandIn
) -> None:
    """Killed three steps behind a checkpoint, so that steps are trained again; then uploaded by W&B itself."""
    output = tmp_path / "run"
    config = endless(workspace, output, wandb__enabled=True, trainer__save_steps=5, trainer__save_total_limit=3)
    pids = ranks.start(config, grace=0.0, env={"WANDB_MODE": "offline"})
    wait_for(lambda: steps_done(output) >= 8)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    ranks.wait()
    killed_at = steps_done(output)
    last = killed_at + 4
    again = {**config, "trainer": {**config["trainer"], "max_steps": last}}
    assert "resuming from" in ranks.run(again, env={"WANDB_MODE": "offline"})

    first, second = offline_files(output)
    run_id = (output / "wandb.id").read_text()
    assert first.name == second.name == f"run-{run_id}.wandb"
    rows = training_rows([*read_history(first), *read_history(second)])
    assert sorted(rows) == list(range(1, last + 1))
    assert read_logged_steps(output, run_id) == set(rows)
    assert list(rows.values()) == pytest.approx(losses(output)), "metrics.jsonl says the same"
    for file in (first, second):
        done = subprocess.run(
            [str(Path(sys.executable).parent / "wandb"), "sync", str(file.parent)],
            env=environment(WANDB_BASE_URL=stand_in.url, WANDB_API_KEY=KEY, WANDB_ERROR_REPORTING="false"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert set(stand_in.upserted) == {run_id}
    assert training_rows(stand_in.history[run_id]) == rows
    logged = stand_in.history[run_id][0]
    for name in ("train/learning_rate", "train/grad_norm", "train/tokens_per_second", "train/images_per_second"):
        assert name in logged
    assert (logged["train/tokens_per_image"], logged["train/tokens_per_image_before"]) == (0, 0)


@pytest.mark.launch
def test_no_network_from_the_start(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    config = config_of(workspace, tmp_path / "run", wandb__enabled=True)
    nowhere = {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": KEY}
    ranks.run(config, env=nowhere)
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.launch
def test_a_network_that_goes_away(workspace: Path, ranks: Ranks, tmp_path: Path, stand_in: WandbStandIn) -> None:
    config = endless(workspace, tmp_path / "run", wandb__enabled=True, trainer__save_strategy="no")
    online = {"WANDB_MODE": "online", "WANDB_BASE_URL": stand_in.url, "WANDB_API_KEY": KEY}
    pids = ranks.start(config, env=online, wandb_finish=2.0)
    wait_for(lambda: steps_done(tmp_path / "run") >= 3)
    assert stand_in.upserted, "it was online"
    stand_in.server.shutdown()
    stand_in.server.server_close()
    gone_at = steps_done(tmp_path / "run")
    wait_for(lambda: steps_done(tmp_path / "run") >= gone_at + 20)
    os.kill(pids[0], signal.SIGTERM)
    assert ranks.wait() == [75, 75]


def test_which_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def config(mode: str = "auto") -> Any:
        return parse_config(
            {"output_dir": "x", "model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}, "wandb": {"mode": mode}}
        )

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key()
    assert choose_mode(config()) == "offline"
    assert choose_mode(config("online")) == "online"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert choose_mode(config()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode(config()) == "offline", "a key for another server is none"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(config("online")) == "disabled"


def test_a_file_cut_off_anywhere_gives_its_whole_rows(tmp_path: Path) -> None:
    script = (
        "import wandb; run = wandb.init(project='p', dir='.', mode='offline', settings=wandb.Settings(silent=True))\n"
        "for step in range(40): run.log({'train/loss': step / 2, 'train/global_step': step, 'pad': 'x' * 2000})\n"
        "run.finish()"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(), check=True, timeout=120)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    whole = read_history(file)
    assert [row["train/global_step"] for row in whole] == list(range(40)), "over several blocks of the log"
    content = file.read_bytes()
    for share in range(1, 40):
        (tmp_path / "cut.wandb").write_bytes(content[: len(content) * share // 40])
        rows = read_history(tmp_path / "cut.wandb")
        assert rows == whole[: len(rows)]
