"""What `make real` runs, with small stand-ins for what it fetches: its config and its commands, from files to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("gguf")

from data import stamps
from data.commands.cache import main as make_cache
from data.stamp_scenes import CATALOGUE
from scripts.make_smol_llava import make
from tests.scripts.smol_parts import SIDE, write_gguf, write_onnx
from tests.train.workspace import Ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks():
    started = Ranks()
    yield started
    started.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A folder laid out as `runs/real` is by `make real`."""
    folder = tmp_path_factory.mktemp("real")
    write_onnx(folder / "vision.onnx")
    write_gguf(folder / "language.gguf")
    make(folder / "vision.onnx", folder / "language.gguf", folder / "model", SIDE, None)
    for number, path in enumerate(path for thing in CATALOGUE for path in thing.stamps):
        (folder / "stamps" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (8, 8), (number % 250, 80, 255 - number % 250, 255)).save(folder / "stamps" / path)
    size = stamps.Size(train=24, eval=3, unseen=2, side=SIDE)
    stamps.write(folder / "data", folder / "stamps", [], size, workers=1)
    return folder


def config_in(folder: Path) -> dict:
    """`configs/smol-llava/ft-32.yaml` with its paths in `folder`, and as little to do as possible."""
    text = (ROOT / "configs" / "smol-llava" / "ft-32.yaml").read_text().replace("runs/real/", f"{folder}/")
    config = yaml.safe_load(text)
    assert config["zip"] == {"dominant": 27, "contextual": 5}
    config["zip"] = {"dominant": 3, "contextual": 2}  # of 9 patches
    config["model"]["dtype"] = "float32"
    config["eval"]["max_questions"] = 8
    config["trainer"] |= {"max_steps": 3, "hang_timeout": 120.0, "torch_compile_backend": "aot_eager"}
    config["wandb"] = {"enabled": False}
    return config


@pytest.mark.launch
def test_from_files_to_report(real: Path, ranks: Ranks, tmp_path: Path) -> None:
    config = config_in(real)
    path = tmp_path / "ft.yaml"
    path.write_text(yaml.safe_dump(config))
    assert make_cache(["--config", str(path), "--workers", "0"]) == 0
    said = ranks.run(config)
    assert "2 processes x 4 samples x 1 accumulated = 8 per step" in said
    run = real / "run"
    results = json.loads((run / "report" / "results.json").read_text())
    assert (results["tokens"], results["of_tokens"], results["questions"]) == (5, 9, 8)
    assert {"full", "training_free", "fine_tuned"} <= results.keys()
    assert (run / "projector").is_dir()
    assert list((run / "report").glob("*.png"))
