"""A process that was killed while it built an extension does not stop the next one."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.train.workspace import ROOT, Ranks, config_of, losses
from train.ending import RunEnded
from train.extensions import build_one_at_a_time, describe_cpu, prepare_extensions, use_own_ninja

HOLD = """
import sys, time
from types import SimpleNamespace
from train.extensions import build_one_at_a_time

def load(verbose):
    open(sys.argv[1], "w")  # as torch does while it builds
    print("building", flush=True)
    time.sleep(60)

build_one_at_a_time([SimpleNamespace(name="adam", load=load)])
"""


def test_the_lock_goes_with_the_process_that_held_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    left = tmp_path / "adam" / "lock"
    left.parent.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(left)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "building\n"
    found: list[bool] = []
    mine = SimpleNamespace(name="adam", load=lambda verbose: found.append(left.exists()))
    waiting = threading.Thread(target=build_one_at_a_time, args=([mine],), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert left.exists(), "of a live process"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    waiting.join(10)
    assert not waiting.is_alive()
    assert found == [False], "what the killed one left is removed before torch could wait for it"


def test_a_folder_that_can_not_be_locked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    with pytest.raises(RunEnded, match="set TORCH_EXTENSIONS_DIR to a folder on a local disk"):
        build_one_at_a_time([])


def test_where_extensions_are_kept_and_which_ninja_builds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that what is set below is taken back
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("PATH", "/usr/bin")
    prepare_extensions()
    assert os.environ["TORCH_EXTENSIONS_DIR"].startswith(
        f"{tmp_path}/visionzip-ft/extensions/torch-{torch.__version__}"
    )
    assert os.environ["TORCH_EXTENSIONS_DIR"].endswith(
        f"-python-{sys.version_info[0]}.{sys.version_info[1]}-{describe_cpu()}"
    )
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    use_own_ninja()
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "elsewhere")
    prepare_extensions()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "elsewhere"


def test_processors_that_can_do_other_things_have_extensions_of_their_own(tmp_path: Path) -> None:
    here, there, alike = (tmp_path / name for name in ("here", "there", "alike"))
    here.write_text("processor\t: 0\ncpu MHz\t: 2600.1\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\n")
    there.write_text("processor\t: 0\ncpu MHz\t: 2600.1\nflags\t\t: fpu avx2\n")
    alike.write_text("processor\t: 0\ncpu MHz\t: 1200.7\nflags\t\t: fpu avx2 avx512f\n")
    assert describe_cpu(here) != describe_cpu(there)
    assert describe_cpu(here) == describe_cpu(alike)
    assert describe_cpu(here).startswith(f"{platform.machine()}-")
    assert describe_cpu(tmp_path / "no Linux") == platform.machine()


@pytest.mark.launch
def test_a_run_does_not_wait_for_what_a_killed_one_left(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(config_of(workspace, tmp_path / "first", trainer__max_steps=1))
    built = list(Path.home().glob(".cache/visionzip-ft/extensions/*/*/build.ninja"))
    assert built, "DeepSpeed builds one wherever it runs on a CPU"
    for extension in built:
        (extension.parent / "lock").touch()
    ranks.run(config_of(workspace, tmp_path / "next", trainer__max_steps=1))
    assert len(losses(tmp_path / "next")) == 1
