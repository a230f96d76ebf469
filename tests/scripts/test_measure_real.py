"""The commands that `scripts.measure_real` starts are ones that the program accepts."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from scripts import measure_real
from scripts.processes import run_measured
from train.config import load_config


def test_tokens_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"image_size": 224, "patch_size": 14}}))
    assert measure_real.tokens_of(tmp_path) == 257


def test_settings_are_a_config(tmp_path: Path) -> None:
    given = Namespace(
        model=tmp_path / "model",
        data=tmp_path / "data",
        samples=8,
        steps=3,
        threads=1,
        overrides=["model.dtype=float32"],
    )
    flag, path, *items = measure_real.overrides(given, (257, 0), None)
    assert flag == "--config"
    config = load_config(path, items)
    assert (config.zip.dominant, config.zip.contextual, config.data.cache) == (257, 0, None)
    assert config.data.sources[0].max_samples == 8


def test_memory_of_a_process_and_the_words_of_one_that_fails() -> None:
    printed, peak = run_measured(["-c", "x = bytearray(200 << 20); print(len(x))"], threads=1)
    assert peak > 200 << 20
    assert printed == f"{200 << 20}\n"
    with pytest.raises(RuntimeError, match="ValueError: because"):
        run_measured(["-c", "raise ValueError('because')"], threads=1)
