"""`visionzip init`: what it writes passes validation and suits the model and the data."""

import json

import pytest
import yaml

from tests.tiny import make_image, tiny_llava, tiny_processor
from train.commands.init import plan_steps
from train.config import load_config
from visionzip.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("init")
    tiny_llava().save_pretrained(place / "model")
    tiny_processor().save_pretrained(place / "model")
    (place / "images").mkdir()
    make_image(0).save(place / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat is this"}, {"from": "gpt", "value": "red"}]
    for name, count in (("train.json", 500), ("held-out.json", 5)):
        records = [{"id": str(number), "image": "a.png", "conversations": turns} for number in range(count)]
        (place / name).write_text(json.dumps(records))
    (place / "empty.json").write_text("[]")
    (place / "other.json").write_text('[{"a": 1}]')
    return place


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    for left in place.glob("*.yaml"):
        left.unlink()
    return place


def test_the_config_is_valid_and_says_why(there, capsys):
    assert main(["init", "model", "train.json", "--images", "images", "--eval", "held-out.json"]) == 0
    config = load_config("run.yaml")
    assert (config.model.path, config.model.dtype, config.output_dir) == ("model", "float32", "runs/run")
    assert (config.zip.dominant, config.zip.contextual) == (0.16, 0.04)
    assert [source.path for source in config.data.sources] == ["train.json"]
    assert [source.images for source in config.eval.sources] == ["images"]
    trainer = config.trainer.model_dump()
    assert (trainer["learning_rate"], trainer["num_train_epochs"], config.trainer.global_batch_size) == (3e-3, 5, 8)
    text = (there / "run.yaml").read_text()
    assert all("#" in line for line in text.splitlines() if "learning_rate" in line or "dominant" in line)
    assert "visionzip train --config run.yaml" in capsys.readouterr().out
    (there / "run.yaml").write_text(text.replace("  # positions: original", "  positions: original"))
    assert load_config("run.yaml").zip == config.zip.model_copy(update={"positions": "original"})


def test_without_held_out_questions_and_with_a_budget(there):
    command = ["init", "model", "train.json", "--images", "images", "--budget", "8", "--out", "new/x.yaml"]
    assert main([*command, "--output-dir", "runs/y: z"]) == 0
    config = load_config("new/x.yaml")
    assert (config.zip.dominant, config.zip.contextual, config.eval) == (7, 1, None)
    assert config.output_dir == "runs/y: z"


def test_a_file_that_is_there_is_not_overwritten(there, capsys):
    (there / "run.yaml").write_text("mine")
    assert main(["init", "model", "train.json", "--images", "images"]) == 2
    assert (there / "run.yaml").read_text() == "mine"
    assert capsys.readouterr().err == "config error: run.yaml exists already; remove it, or name another with --out\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("nowhere train.json", "there is nothing at nowhere"),
        ("model nowhere.json", "there is no file"),
        ("model empty.json", "it is empty"),
        ("model other.json", "none of its first records can be used"),
        ("model train.json", "names an image that does not exist"),
        ("model train.json --images images --budget x", "'x' is not a budget"),
        ("model train.json --images images --budget all", "give fewer than all"),
        ("model train.json --images images --eval other.json", "other.json: none of its first"),
    ],
)
def test_what_can_not_be_used_is_one_line_and_nothing_is_written(there, capsys, command, message):
    assert main(["init", *command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, error
    assert not list(there.glob("*.yaml"))


@pytest.mark.parametrize(
    ("records", "expected"),
    [(66_530, (128, 1, 520)), (4_000, (8, 1, 500)), (500, (8, 5, 315)), (60, (8, 10, 80)), (1, (8, 10, 10))],
)
def test_steps(records, expected):
    assert plan_steps(records) == expected


@pytest.mark.parametrize("model", ["llava-1.5-7b", "tiny-llava"])
def test_suits_models_as_their_own_recipes_do(model, there, monkeypatch, tmp_path):
    """Learning rate and budget of a 7B model are the paper's, those of the embedded one close to the demo's."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    folder = tmp_path / "model"
    if model == "tiny-llava":
        folder = root / "data" / "tiny-llava"
    else:
        tiny_processor().save_pretrained(folder)
        (folder / "config.json").write_text((root / "configs" / model / "model.json").read_text())
    assert main(["init", str(folder), "train.json", "--images", "images"]) == 0
    ours = yaml.safe_load((there / "run.yaml").read_text())
    recipe = yaml.safe_load((root / "configs" / model / ("ft-64.yaml" if "7b" in model else "demo.yaml")).read_text())
    assert ours["trainer"]["learning_rate"] == recipe["trainer"]["learning_rate"]
    assert ours["model"]["dtype"] == recipe["model"]["dtype"]
    if "7b" in model:
        assert ours["zip"] == recipe["zip"]
