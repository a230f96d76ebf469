"""A run that reads its visual tokens from a cache: the losses of one on pixels, without a vision tower; refused where stale."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data.commands.cache import main as make_cache
from tests.train.workspace import Ranks, config_of, losses, projector, write_config
from train.ending import Exit


@pytest.fixture(scope="module")
def tokens(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    config = write_config(config_of(workspace, folder / "run", data__cache=str(folder / "tokens")))
    assert make_cache(["--config", str(config), "--workers", "0"]) == 0
    return folder / "tokens"


@pytest.mark.launch
def test_same_losses_and_projector_as_from_pixels(workspace: Path, ranks: Ranks, tmp_path: Path, tokens: Path) -> None:
    pixels = config_of(workspace, tmp_path / "pixels")
    ranks.run(pixels)
    for stage in ("zero2", "zero3", "off"):
        cached = config_of(workspace, tmp_path / stage, data__cache=str(tokens), trainer__deepspeed=stage)
        said = ranks.run(cached)
        assert losses(tmp_path / stage) == pytest.approx(losses(tmp_path / "pixels"), rel=1e-5), stage
        for name, tensor in projector(tmp_path / "pixels").items():
            assert (projector(tmp_path / stage)[name] - tensor).norm() / tensor.norm() < 1e-4, stage
        # With the vision tower they would be 80,048: it was not even loaded.
        assert "training 3,936 of 47,568 parameters" in said


@pytest.mark.launch
def test_a_stale_cache_ends_the_run_and_says_why(workspace: Path, ranks: Ranks, tmp_path: Path, tokens: Path) -> None:
    config = config_of(workspace, tmp_path / "stale", data__cache=str(tokens), zip__dominant=6)
    ranks.start(config, world=1)
    assert ranks.wait() == [Exit.CONFIG]
    assert "zip.dominant: 5 there, 6 here" in ranks.output()
    assert yaml.safe_load((tmp_path / "stale.yaml").read_text())["zip"]["dominant"] == 6
