"""Two nodes on one machine: two launchers with a rank each, and folders the other does not see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.train.workspace import (
    ROOT,
    Ranks,
    config_of,
    environment,
    equal,
    losses,
    projector,
    write_config,
)
from train.launch import free_port


def run_nodes(script: str, configs: list[Path], overrides: list[list[str]], **env: str) -> list[str]:
    """Start `script` once a node and wait; returns what each printed."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            ["sh", str(ROOT / "scripts" / script), "--config", str(config), *override],
            env=environment(NODE_RANK=str(node), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for node, (config, override) in enumerate(zip(configs, overrides, strict=True))
    ]
    try:
        said = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            end_with_children(process)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return said


def end_with_children(process: subprocess.Popen[str]) -> None:
    """What a launcher that did not end by itself would leave behind."""
    if process.poll() is None:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        process.wait()


def node_config(workspace: Path, output: Path) -> dict[str, Any]:
    save = {"trainer__save_strategy": "steps", "trainer__save_steps": 2, "trainer__lr_scheduler_type": "constant"}
    return config_of(workspace, output, **save)


@pytest.mark.launch
def test_torchrun_on_two_nodes_that_share_no_folder(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Node 1 never sees a checkpoint; it resumes all the same, from what rank 0 reads."""
    config = node_config(workspace, tmp_path / "node0" / "run")
    elsewhere = node_config(workspace, tmp_path / "node1" / "run")
    straight = node_config(workspace, tmp_path / "straight")
    ranks.run(straight)
    ranks.run({**config, "trainer": {**config["trainer"], "max_steps": 4}})
    paths = [write_config(config), write_config(elsewhere)]
    said = run_nodes("train_torchrun.sh", paths, [[], []], NODES="2", GPUS="1")
    assert "2 processes x 2 samples x 2" in said[0]
    assert f"resuming from {tmp_path}/node0/run/checkpoint-4" in said[0]
    assert "parameters" not in said[1], "one voice"
    assert not list((tmp_path / "node1").glob("run/*")), "nothing is written anywhere but on node 0"
    assert losses(tmp_path / "node0" / "run") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)


@pytest.mark.launch
def test_deepspeed_with_a_hostfile(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("nodea slots=1\nnodeb slots=1\n")
    one = config_of(workspace, tmp_path / "one_launcher")
    ranks.run(one)
    config = write_config(config_of(workspace, tmp_path / "two_launchers"))
    run_nodes("train_hostfile.sh", [config] * 2, [[], []], HOSTFILE=str(tmp_path / "hosts"))
    assert losses(tmp_path / "two_launchers") == losses(tmp_path / "one_launcher")
    assert equal(projector(tmp_path / "two_launchers"), projector(tmp_path / "one_launcher"))


def test_scripts_are_right_for_their_shell() -> None:
    for script in (ROOT / "scripts").glob("train_*"):
        shell = "bash" if script.suffix == ".sbatch" else "sh"
        subprocess.run([shell, "-n", str(script)], check=True)
        assert "train.py" in script.read_text()
    refused = subprocess.run(
        ["sh", str(ROOT / "scripts" / "train_hostfile.sh")],
        env={k: v for k, v in os.environ.items() if k != "HOSTFILE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "set HOSTFILE" in refused.stderr


@pytest.mark.launch
def test_the_slurm_script_with_a_stand_in_for_slurm(workspace: Path, tmp_path: Path) -> None:
    """`srun` starts a rank a task; a rank that saved after a signal puts the job back into the queue."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "srun").write_text(
        "#!/bin/bash\n"
        'for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!); done\n'
        'worst=0; for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > worst)) && worst=$code; done; exit $worst\n'
    )
    (bin_dir / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = requeue ] && echo "$2" > {tmp_path}/requeued; echo localhost\n'
    )
    for tool in bin_dir.iterdir():
        tool.chmod(0o755)
    config = write_config(config_of(workspace, tmp_path / "run"))
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    env = environment(**slurm, PATH=f"{bin_dir}:{os.environ['PATH']}")
    script = ["bash", str(ROOT / "scripts" / "train_slurm.sbatch"), "--config", str(config)]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 processes x" in done.stderr
    assert not (tmp_path / "requeued").exists()
    (bin_dir / "srun").write_text("#!/bin/bash\nexit 75\n")
    assert subprocess.run(script, env=env, capture_output=True, timeout=60, check=False).returncode == 75
    assert (tmp_path / "requeued").read_text() == "7\n"
