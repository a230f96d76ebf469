"""A process that was killed while it built an extension does not stop the next one."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.train.workspace import ROOT, Ranks, config_of, losses
from train.extensions import Baton, prepare_extensions, processor, use_own_ninja

HOLD = "import sys, time; from train.extensions import Baton; Baton(sys.argv[1]).try_acquire() and print('held', flush=True); time.sleep(60)"


def test_the_lock_goes_with_the_process_that_held_it(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    mine = Baton(path)
    assert not mine.try_acquire()
    waiting = threading.Thread(target=Baton(path).wait, daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    waiting.join(10)
    assert not waiting.is_alive()
    assert mine.try_acquire()
    mine.release()
    assert mine.try_acquire(), "the file itself means nothing"


def test_where_extensions_are_kept_and_which_ninja_builds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpp_extension, "FileBaton", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that what is set below is taken back
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("PATH", "/usr/bin")
    prepare_extensions()
    assert cpp_extension.FileBaton is Baton
    assert os.environ["TORCH_EXTENSIONS_DIR"].startswith(
        f"{tmp_path}/visionzip-ft/extensions/torch-{torch.__version__}"
    )
    assert os.environ["TORCH_EXTENSIONS_DIR"].endswith(
        f"-python-{sys.version_info[0]}.{sys.version_info[1]}-{processor()}"
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
    assert processor(here) != processor(there)
    assert processor(here) == processor(alike)
    assert processor(here).startswith(f"{platform.machine()}-")
    assert processor(tmp_path / "no Linux") == platform.machine()


@pytest.mark.launch
def test_a_run_does_not_wait_for_what_a_killed_one_left(workspace: Path, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(config_of(workspace, tmp_path / "first", trainer__max_steps=1))
    built = list(Path.home().glob(".cache/visionzip-ft/extensions/*/*/build.ninja"))
    for extension in built:
        (extension.parent / "lock").touch()
    ranks.run(config_of(workspace, tmp_path / "next", trainer__max_steps=1))
    assert len(losses(tmp_path / "next")) == 1
