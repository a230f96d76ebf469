"""What was trained together is exported, loaded, described and evaluated together; the directory of a run stands for it."""

import pytest
import torch

from tests.export.conftest import BUDGET, add_lora, answers
from tests.tiny import tiny_llava, tiny_processor
from train.config import parse_config
from train.outcome import export_result
from visionzip import attach, attached, load, save
from visionzip.cli import main
from visionzip.export import load_into, loaded_into, read_export, run_result
from visionzip.inspect import describe
from visionzip.projector import projector_state


@pytest.fixture
def finish(tmp_path):
    """Leave behind what a run with this `train` section does."""

    def write(model, **section):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text("seed: 0\n")
        config = parse_config(
            {
                "output_dir": str(run),
                "model": {"path": "m"},
                "zip": BUDGET.model_dump(),
                "train": section,
                "data": {"sources": [{"path": "x.json"}]},
            }
        )
        export_result(model, attached(model).processor, config, {"steps": 3}, write=True)
        return run

    return write


LORA = {"lora": {"on": ["llm"], "r": 4}}


def test_a_projector(trained, finish):
    run = finish(trained)
    assert [path.name for path in run.iterdir() if path.is_dir()] == ["projector"]
    assert torch.equal(answers(*load(run, "cpu")), answers(trained, attached(trained).processor))
    assert read_export(run).header.metadata == {"steps": 3}


def test_lora_and_projector_go_together(adapted, finish, tmp_path, capsys):
    run = finish(adapted, **LORA)
    expected = answers(adapted, attached(adapted).processor)
    assert [path.name for path in run.iterdir() if path.is_dir()] == ["adapter"]
    for place in (run, run / "adapter"):
        assert torch.equal(answers(*load(place, "cpu")), expected)
    found = describe(run)
    assert found.what == "a training run, finished"
    assert found.use[0] == f"visionzip inspect {run / 'adapter'}"
    assert "4 LoRA adapters" in describe(run / "adapter").what
    assert main(["export", str(run), "--format", "merged", "--out", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(answers(*load(tmp_path / "merged", "cpu")), expected, rtol=1e-4, atol=1e-5)
    assert main(["export", str(run), "--out", str(tmp_path / "alone")]) == 2
    assert "adapter tensors were trained too" in capsys.readouterr().err


def test_a_trained_llm_comes_as_a_whole_model(trained, finish):
    with torch.no_grad():
        trained.lm_head.weight.add_(0.1)
        trained.model.language_model.layers[0].mlp.up_proj.weight.add_(0.1)
    run = finish(trained, parts=["projector", "llm"])
    assert [path.name for path in run.iterdir() if path.is_dir()] == ["model"]
    assert torch.equal(answers(*load(run, "cpu")), answers(trained, attached(trained).processor))
    with pytest.raises(ValueError, match=r"(?s)trained for something else.*llm: "):
        load_into(attach(tiny_llava(), tiny_processor(), BUDGET), run)


def test_the_result_of_another_run_in_the_same_directory_does_not_stay(adapted, finish):
    run = finish(adapted, **LORA)
    fresh = attach(tiny_llava(), tiny_processor(), BUDGET)
    finish(fresh)
    assert run_result(run) == run / "projector"
    assert not (run / "adapter").exists()


def test_a_part_of_what_was_trained_is_refused(adapted, finish):
    """As toolkits before 0.2 left it: a projector beside the adapters it was trained with."""
    run = finish(adapted, **LORA)
    alone = attach(tiny_llava(), tiny_processor(), BUDGET)
    alone.config._name_or_path = adapted.config._name_or_path
    save(alone, run / "projector")
    for use in (read_export, lambda path: load(path, "cpu")):
        for place in (run / "projector", run / "projector" / "projector.safetensors"):
            with pytest.raises(ValueError, match=r"only a part of what .*run trained.*; use .*run/adapter"):
                use(place)
    assert "only a part" in describe(run / "projector").problems[0]


def test_a_run_that_has_not_finished(finish, trained):
    run = finish(trained)
    (run / "projector" / "projector.safetensors").unlink()
    (run / "projector" / "README.md").unlink()
    (run / "projector").rmdir()
    with pytest.raises(ValueError, match=r"has not finished, so there is no projector in it yet$"):
        load(run, "cpu")
    for step in (4, 12):
        (run / f"checkpoint-{step}").mkdir()
    with pytest.raises(ValueError, match=r"start it again and it continues from checkpoint-12$"):
        read_export(run)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["linear_1", "linear_2"]])
def test_loaded_for_a_while(trained, base, tmp_path, targets):
    """The evaluation compares what was trained with the same model before, which must then be the same again."""
    processor = attached(trained).processor
    tiny_llava().save_pretrained(base)
    other = attach(tiny_llava(), tiny_processor(), BUDGET)
    if "linear_1" in targets:  # LoRA in the projector sits on the base's own
        trained.load_state_dict(tiny_llava().state_dict())
    before, names = answers(other, processor), [name for name, _ in other.named_parameters()]
    out = save(add_lora(trained, targets), tmp_path / "out", "peft")
    for _ in range(2):
        with loaded_into(other, out) as header:
            assert header.zip == BUDGET
            assert torch.equal(answers(other, processor), answers(trained, processor))
            with pytest.raises(ValueError, match="already has adapters"), loaded_into(other, out):
                pass
        assert torch.equal(answers(other, processor), before)
        assert [name for name, _ in other.named_parameters()] == names


def test_a_projector_loaded_for_a_while(trained, tmp_path):
    other = attach(tiny_llava(), tiny_processor(), BUDGET)
    before = projector_state(other)
    out = save(trained, tmp_path / "out")
    with loaded_into(other, out):
        assert not torch.equal(next(iter(projector_state(other).values())), next(iter(before.values())))
    assert all(torch.equal(value, before[name]) for name, value in projector_state(other).items())
