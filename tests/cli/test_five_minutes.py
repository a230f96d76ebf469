"""docs/five-minutes.md as it stands: its records are read, and its commands run one after the other."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import formats
from data.formats.common import RecordSource
from visionzip.export import read_export

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "five-minutes.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_records_that_it_shows_are_read(tmp_path: Path) -> None:
    (block,) = blocks("json")
    (record,) = json.loads(block)
    sample = formats.parse_record(record, RecordSource("mine", "auto", str(tmp_path)), 0)
    assert [Path(media.source).name for media in sample.media] == ["kitchen.jpg"]
    assert sample.messages[-1].text == "A red bowl."


@pytest.mark.launch
def test_its_commands_run(tmp_path: Path) -> None:
    """In a shell, in a folder that sees the checkout's `data/`; `python` and `visionzip` are this environment's."""
    (tmp_path / "bin").mkdir()
    for name, target in (("python", ""), ("visionzip", "-m visionzip")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {target} "$@"\n')
        script.chmod(0o755)
    (tmp_path / "data").symlink_to(ROOT / "data")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        environment.pop(name, None)
    environment |= {"WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    said = ""
    for block in blocks("bash"):
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        said += done.stdout
    assert "400" in said
    assert "fits" in said
    stored = read_export(tmp_path / "runs" / "run")
    assert stored.header.zip is not None
    assert (stored.header.zip.dominant, stored.header.zip.contextual) == (13, 3)
    assert "> what colour is the circle?" in said.splitlines()
