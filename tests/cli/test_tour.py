"""The notebook of `examples/` runs from its first cell to its last."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.launch
def test_the_tour_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    for name in ("data", "configs", "train", "visionzip", "examples", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOUR_STEPS", "4")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    namespace: dict = {}
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    for number, source in enumerate(code):
        exec(compile(source, f"cell {number}", "exec"), namespace)
    said = capsys.readouterr().out
    assert "16 of 81 tokens" in said
    assert [line.split()[0] for line in said.splitlines() if "%" in line][-3:] == [
        "full",
        "training_free",
        "fine_tuned",
    ]
    assert (tmp_path / "runs" / "tour" / "projector").is_dir()
