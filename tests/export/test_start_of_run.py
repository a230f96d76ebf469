"""`model.projector` of a run takes what was trained in any format."""

import pytest
import torch

from tests.export.conftest import BUDGET
from train.build import build_model
from train.config import ConfigError, parse_config
from visionzip import save
from visionzip.projector import projector_state


def config(base, projector, **zip_changes):
    return parse_config(
        {
            "output_dir": "runs/x",
            "model": {"path": str(base), "dtype": "float32", "projector": str(projector)},
            "zip": {**BUDGET.model_dump(), **zip_changes},
            "data": {"sources": [{"path": "x.json"}]},
        }
    )


@pytest.mark.parametrize("name", ["safetensors", "llava", "merged", "peft"])
def test_every_format(trained, base, tmp_path, name):
    out = save(trained, tmp_path / f"llava-{name}", name, **({"vision_tower": "x"} if name == "llava" else {}))
    model, _ = build_model(config(base, out))
    for key, value in projector_state(trained).items():
        expected = value.half().float() if name == "llava" else value
        assert torch.equal(model.state_dict()[key], expected)


def test_another_budget_is_refused(trained, base, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)trained for something else.*ZipConfig.dominant"):
        build_model(config(base, save(trained, tmp_path / "out", "peft"), dominant=6))


def test_adapters_are_refused(adapted, base, tmp_path):
    with pytest.raises(ConfigError, match="Export it as merged first"):
        build_model(config(base, save(adapted, tmp_path / "out", "peft")))
