"""Runs that are killed, stopped, starved of disk, fed with nonsense or left hanging. The table of docs/resilience.md counts these."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.tiny import WORDS
from tests.train.workspace import (
    ROOT,
    Ranks,
    command,
    config_of,
    environment,
    equal,
    launch,
    losses,
    projector,
    train_script,
    write_config,
)
from train import checkpoint
from train.callbacks import read_metrics

WITHIN = 60.0  # seconds; generous for two loaded cores, and far below the 30 minutes of a collective's own timeout


def endless(workspace: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """More steps than any test waits for, saved every other one."""
    changes = {
        "trainer__max_steps": 100_000,
        "trainer__save_strategy": "steps",
        "trainer__save_steps": 2,
        "trainer__save_total_limit": 2,
        "trainer__lr_scheduler_type": "constant",
        **changes,
    }
    return config_of(workspace, output, **changes)


def wait_for(what: Any, seconds: float = WITHIN) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.01)


def steps_done(output: Path) -> int:
    return max((line["step"] for line in read_metrics(output / "metrics.jsonl")), default=0)


@pytest.mark.launch
def test_killed_ten_times_it_ends_with_the_same_projector(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """SIGKILL to both ranks at random moments, every other time in the middle of writing a checkpoint."""
    rng = random.Random(7)
    plan = {
        "trainer__max_steps": 60,
        "trainer__save_strategy": "steps",
        "trainer__save_steps": 1,
        "trainer__save_total_limit": 2,
    }
    never = config_of(workspace, tmp_path / "never", **plan)
    ranks.run({**never, "trainer": {**never["trainer"], "save_strategy": "no"}})
    output = tmp_path / "killed"
    config = config_of(workspace, output, **plan)
    kills, while_writing = 0, 0
    while kills < 11:
        before = steps_done(output)
        pids = ranks.start(config, slow_writes=0.02, grace=0.0)
        wait_for(lambda before=before: steps_done(output) > before)
        if kills % 2:
            wait_for(lambda: any(output.glob(".writing-checkpoint-*")))
        else:
            time.sleep(rng.uniform(0, 0.15))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        kills += 1
        while_writing += any(output.glob(".writing-checkpoint-*"))
        assert ranks.wait() == [-signal.SIGKILL] * 2
    assert while_writing >= 3, "too few kills hit a checkpoint being written"
    assert steps_done(output) < 60, "the run must not have been over before the last kill"
    ranks.run(config)
    assert equal(projector(output), projector(tmp_path / "never"))
    assert losses(output) == losses(tmp_path / "never"), "each step is logged once, with the loss it always had"
    assert not any(output.glob(".*checkpoint*")), "nothing half-written is left"


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_ends_all(
    workspace: Path, ranks: Ranks, tmp_path: Path, number: signal.Signals
) -> None:
    config = endless(workspace, tmp_path / "run", trainer__save_steps=1_000_000)
    pids = ranks.start(config)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2)
    os.kill(pids[1], number)
    assert ranks.wait() == [75, 75]
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    checkpoint.verify(saved)
    assert "Start the same command again" in ranks.output()
    step = int(saved.name.split("-")[1])
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] == step, (
        "nothing is done twice"
    )
    again = ranks.run({**config, "trainer": {**config["trainer"], "max_steps": step + 1}})
    assert f"resuming from {saved}" in again
    assert steps_done(tmp_path / "run") == step + 1


@pytest.mark.launch
def test_the_launcher_passes_the_exit_code_on(workspace: Path, tmp_path: Path) -> None:
    """What a job script sees: `deepspeed` ends with 75 when a rank was told to stop."""
    config = endless(workspace, tmp_path / "run")
    process = subprocess.Popen(
        command(train_script(config), "deepspeed", 2),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, 200)
    rank = next(
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("--local_rank=0" in part for part in child.cmdline())
    )
    rank.send_signal(signal.SIGTERM)
    assert process.wait(WITHIN) == 75
    assert checkpoint.list_checkpoints(tmp_path / "run")


@pytest.mark.launch
def test_a_rank_that_dies_ends_the_other(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    config = endless(workspace, tmp_path / "run", trainer__hang_timeout=20.0)
    pids = ranks.start(config, grace=WITHIN)
    wait_for(lambda: steps_done(tmp_path / "run") >= 4)
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    codes = ranks.wait()
    assert time.monotonic() - start < WITHIN
    assert codes[1] == -signal.SIGKILL
    assert codes[0] in (1, 71), "by the broken connection, or by its own watchdog"
    assert checkpoint.find_newest_complete(tmp_path / "run", print) is not None


@pytest.mark.launch
def test_a_rank_that_hangs_ends_both(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """A stopped process is what a rank stuck in a driver or a file system looks like to the others."""
    config = endless(workspace, tmp_path / "run", trainer__hang_timeout=6.0)
    pids = ranks.start(config, grace=2.0)
    wait_for(lambda: steps_done(tmp_path / "run") >= 4)
    os.kill(pids[1], signal.SIGSTOP)
    start = time.monotonic()
    codes = ranks.wait()  # the launcher kills the stopped one, as deepspeed and torchrun do
    assert time.monotonic() - start < WITHIN
    assert codes == [71, -signal.SIGKILL]
    assert "no progress for 6 s while" in ranks.output()
    assert checkpoint.find_newest_complete(tmp_path / "run", print) is not None


@pytest.mark.launch
def test_a_loss_that_is_not_finite_ends_the_run(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    config = endless(
        workspace, tmp_path / "run", trainer__learning_rate=1e30, trainer__max_grad_norm=0.0, trainer__save_steps=1
    )
    ranks.start(config)
    assert 70 in ranks.wait()
    said = ranks.output()
    assert "learning_rate" in said
    assert said.count("run ended with exit code 70") <= 2
    for saved in checkpoint.list_checkpoints(tmp_path / "run"):
        reader = checkpoint.Reader(saved)
        assert all(bool(reader.tensor(name).isfinite().all()) for name in reader.shapes())


@pytest.mark.launch
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_a_gradient_that_is_not_finite_ends_the_run(workspace: Path, ranks: Ranks, tmp_path: Path, stage: str) -> None:
    """DeepSpeed leaves such a step out and goes on, to the end of a run that learns nothing; without ZeRO it takes it."""
    config = endless(workspace, tmp_path / "run", trainer__deepspeed=stage, trainer__save_steps=1, trainer__max_steps=6)
    ranks.start(config, bad_gradient=4)
    assert 70 in ranks.wait()
    assert "is not finite at step" in ranks.output() or "the gradient is" in ranks.output()
    assert checkpoint.list_checkpoints(tmp_path / "run")
    for saved in checkpoint.list_checkpoints(tmp_path / "run"):
        reader = checkpoint.Reader(saved)
        assert all(bool(reader.tensor(name).isfinite().all()) for name in reader.shapes())


@pytest.mark.launch
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """The kernel refuses to let a file grow, as a full disk or a quota does; then there is room again."""
    output = tmp_path / "run"
    config = endless(workspace, output, trainer__max_steps=4)
    ranks.run({**config, "trainer": {**config["trainer"], "max_steps": 2}})
    last = checkpoint.find_newest_complete(output, print)
    assert last is not None
    ranks.start(config, file_limit=40_000, env={"WANDB_MODE": "disabled"})
    assert 74 in ranks.wait()
    said = ranks.output()
    assert "could not be written" in said
    assert "exit code 74" in said
    assert checkpoint.find_newest_complete(output, print) == last
    assert not any(output.glob(".writing*"))
    ranks.run(config)
    assert (output / "checkpoint-4").is_dir()


@pytest.mark.launch
def test_a_full_disk_at_the_end_is_said_in_a_sentence_and_the_export_follows(
    workspace: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """safetensors has errors of its own kind, which ended in a traceback and exit code 1."""
    output = tmp_path / "run"
    config = endless(workspace, output, trainer__max_steps=4)
    ranks.start(config, killed_before_export=True, grace=0.0)
    assert -signal.SIGKILL in ranks.wait()
    ranks.start(config, file_limit=12_000)
    assert 74 in ranks.wait()
    said = ranks.output()
    assert re.search(
        rf"run ended with exit code 74: {output}/projector\S* could not be written: File too large\. Make room", said
    )
    assert "Traceback" not in said
    assert not (output / "projector" / "projector.safetensors").exists()
    ranks.run(config)
    ranks.run(endless(workspace, tmp_path / "never", trainer__max_steps=4))
    assert equal(projector(output), projector(tmp_path / "never"))


@pytest.mark.launch
def test_a_weight_of_the_llm_that_is_not_finite_ends_every_rank_at_the_export(
    workspace: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """In a row of the embedding that no record reads: no loss and no gradient shows it, and rank 0 alone has it whole."""
    shutil.copytree(workspace / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("embed_tokens.weight"))
    state[name][WORDS.index("yes"), 1] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    config = config_of(
        workspace, tmp_path / "run", trainer__deepspeed="zero3", trainer__max_steps=1, train__parts=["projector", "llm"],
        model__path=str(tmp_path / "model"),
    )  # fmt: skip
    ranks.start(config)
    assert ranks.wait() == [70, 70]
    assert re.search(r"embed_tokens.weight contains 1 values that are not finite", ranks.output())
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.launch
def test_a_kill_between_the_last_checkpoint_and_the_export_costs_nothing(
    workspace: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """A constant rate: another step, which was taken each time, would change the projector."""
    output = tmp_path / "run"
    config = endless(workspace, output, trainer__max_steps=4)
    ranks.run(endless(workspace, tmp_path / "never", trainer__max_steps=4))
    for _ in range(3):
        ranks.start(config, killed_before_export=True, grace=0.0)
        assert -signal.SIGKILL in ranks.wait()
        assert [path.name for path in checkpoint.list_checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    ranks.run(config)
    assert equal(projector(output), projector(tmp_path / "never"))
    assert losses(output) == losses(tmp_path / "never")


@pytest.mark.launch
def test_a_start_that_fails_leaves_nothing_behind(workspace: Path, tmp_path: Path) -> None:
    """Neither `.running` nor `config.yaml`; and DeepSpeed does not announce its extensions before the mistake."""
    gone = config_of(workspace, tmp_path / "run", model__path=str(tmp_path / "nowhere"))
    done = launch(gone, expect=2)
    assert "config error: model" in done.stderr
    assert "built successfully" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
def test_a_second_run_in_the_same_directory_is_refused(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    config = endless(workspace, tmp_path / "run")
    pids = ranks.start(config)
    wait_for(lambda: steps_done(tmp_path / "run") >= 1)
    written = write_config({**config, "output_dir": str(tmp_path / "second")})
    done = subprocess.run(
        command([str(ROOT / "train.py"), "--config", str(written), f"output_dir={tmp_path}/run"]),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert f"another run is writing into {tmp_path}/run" in done.stderr
    os.kill(pids[0], signal.SIGTERM)
    assert ranks.wait() == [75, 75], "the first one goes on until it is told to stop"


@pytest.mark.launch
def test_a_directory_that_can_not_be_made_is_said_before_anything_is_loaded(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = write_config(config_of(workspace, tmp_path / "run"))
    script = ["train.py", "--config", str(path), f"output_dir={tmp_path}/file/run"]
    done = subprocess.run(command(script), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 74
    assert f"output_dir {tmp_path}/file/run can't be written" in done.stderr
    assert "Traceback" not in done.stderr
