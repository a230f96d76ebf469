"""Every mistake at once, under its dotted path; what is printed can be read again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.config_file import read_config_file
from tests.train.workspace import ROOT, environment
from train.arguments import STAGES, TrainerSection, accumulation_steps, training_arguments
from train.config import ConfigError, ReportSection, RunConfig, load_config, parse_config, to_yaml
from train.config_help import COMPARED, IMPORTANT, describe_config

GOOD: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"path": "some/model"},
    "data": {"sources": [{"path": "train.json"}]},
}


def mistakes(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({**GOOD, **changes})
    return str(caught.value)


def test_every_mistake_is_named_at_once() -> None:
    said = mistakes(
        modle=3,
        seed="7",
        model={"dtyp": "x", "dtype": "fp8", "path": "m"},
        zip={"dominant": "54"},
        data={"sources": [{"pth": "x"}], "max_length": 1},
        trainer={
            "learning_rte": 1e-4,
            "num_train_epochs": "3",
            "deepspeed": "zero9",
            "hang_timeout": "long",
            "seed": 3,
        },
    )
    for path, hint in {
        "modle": "did you mean model?",
        "seed": "integer",
        "model.dtyp": "did you mean dtype?",
        "model.dtype": "'float32', 'bfloat16' or 'float16'",
        "zip.dominant": "found '54'",
        "data.sources.0.pth": "did you mean path?",
        "data.sources.0.path": "is needed",
        "data.max_length": "16",
        "trainer.learning_rte": "did you mean learning_rate?",
        "trainer.num_train_epochs": "found '3'",
        "trainer.deepspeed": "zero2_offload",
        "trainer.hang_timeout": "number",
        "trainer.seed": "set seed at the top",
    }.items():
        line = next((line for line in said.splitlines() if line.strip().startswith(f"{path}:")), None)
        assert line is not None, f"{path} is not named in\n{said}"
        assert hint in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"parts": []}}, "nothing would train"),
        ({"train": {"parts": ["llm"], "lora": {"on": ["llm"]}}}, "llm can't be trained both in full and with LoRA"),
        ({"train": {"parts": ["vision"]}}, "train.parts.0"),
        ({"model": {"path": "m", "quantization": "4bit"}, "train": {"parts": ["llm"]}}, "use train.lora"),
        ({"model": {"path": "m", "quantization": "4bit"}, "trainer": {"deepspeed": "zero3"}}, "ZeRO-3"),
        ({"trainer": {"global_batch_size": 8, "gradient_accumulation_steps": 2}}, "follows from global_batch_size"),
        ({"trainer": {"fsdp": "full_shard"}}, "use trainer.deepspeed"),
        ({"trainer": {"optim": "adafactor"}}, "trainer.optim"),
        ({"zip": {"dominant": 0}}, "dominant"),
        ({"trainer": {"max_steps": 0}}, "trainer.max_steps: must be at least 1, or -1"),
        ({"trainer": {"max_steps": -2}}, "trainer.max_steps"),
        ({"trainer": {"num_train_epochs": 0}}, "trainer.num_train_epochs: must be greater than 0"),
        ({"trainer": {"save_steps": 0}}, "trainer.save_steps: must be greater than 0; save_strategy=no saves nothing"),
        ({"trainer": {"logging_steps": 0}}, "trainer.logging_steps"),
        ({"trainer": {"save_total_limit": 0}}, "trainer.save_total_limit"),
        ({"trainer": {"learning_rate": -1}}, "trainer.learning_rate: must be greater than 0 (found -1)"),
        ({"trainer": {"learning_rate": float("nan")}}, "trainer.learning_rate: must be a finite number"),
        ({"trainer": {"weight_decay": -0.1}}, "trainer.weight_decay"),
        ({"trainer": {"adam_beta2": 1.0}}, "trainer.adam_beta2: must be at least 0 and less than 1"),
        ({"trainer": {"warmup_steps": -1}}, "trainer.warmup_steps"),
        ({"trainer": {"per_device_train_batch_size": 0}}, "trainer.per_device_train_batch_size: must be at least 1"),
        ({"trainer": {"gradient_accumulation_steps": 0}}, "trainer.gradient_accumulation_steps"),
        ({"trainer": {"dataloader_num_workers": -1}}, "trainer.dataloader_num_workers"),
        (
            {"trainer": {"lr_scheduler_type": "cosin"}},
            "trainer.lr_scheduler_type: 'cosin' is not one of linear, cosine",
        ),
        ({"trainer": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "trainer.lr_scheduler_type"),
        ({"trainer": {"save_strategy": "best"}}, "trainer.save_strategy: 'best' is not one of no, steps, epoch"),
        ({"trainer": {"per_device_eval_batch_size": 4}}, "trainer.per_device_eval_batch_size: set eval.batch_size"),
    ],
)
def test_what_does_not_fit_together(changes: dict[str, Any], says: str) -> None:
    assert says in mistakes(**changes)


def test_the_resolved_config_can_be_read_again(tmp_path: Path) -> None:
    config = parse_config(
        {**GOOD, "trainer": {"learning_rate": 2e-5, "warmup_steps": 0.03}, "eval": {"sources": [{"path": "e"}]}}
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(to_yaml(parse_config(GOOD)))
    config = load_config(
        tmp_path / "c.yaml", ["trainer.learning_rate=2e-5", "train.parts=[llm]", "model.revision=null", "seed=3"]
    )
    assert config.trainer.model_extra == {"learning_rate": 2e-5}
    assert (config.train.parts, config.seed) == (["llm"], 3)
    for wrong in ("seed", "=3", "seed.x=3"):
        with pytest.raises(ConfigError):
            load_config(tmp_path / "c.yaml", [wrong])


def test_words_that_yaml_takes_for_false(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(GOOD))
    trainer = load_config(tmp_path / "c.yaml", ["trainer.deepspeed=off", "trainer.save_strategy=no"]).trainer
    assert (trainer.deepspeed, trainer.model_extra) == ("off", {"save_strategy": "no"})
    with pytest.raises(ConfigError, match=r"trainer\.save_strategy"):
        load_config(tmp_path / "c.yaml", ["trainer.save_strategy=yes"])


@pytest.mark.parametrize("content", ["- a\n- b", "a: [", "output_dir: ${nothing}", "\xff\xfe"])
def test_a_file_that_is_no_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="there is no config file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_config_is_right(path: Path) -> None:
    config = load_config(path)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("train.py --config" in line for line in head), "the launch command heads the file"
    if "llava-1.5" in str(path):
        assert config.trainer.global_batch_size == 128
        assert config.trainer.model_extra["learning_rate"] == 2e-5  # type: ignore[index]
        assert config.data.sources[0].fraction == 0.1


def test_every_stage_has_a_config_that_deepspeed_takes() -> None:
    for stage in STAGES:
        content = parse_config({**GOOD, "trainer": {"deepspeed": stage}}).trainer.deepspeed_config()
        assert (content is None) == (stage == "off")
        if content is not None:
            assert content["zero_optimization"]["stage"] == int(stage[4])
            assert "optimizer" not in content, "the trainer makes it, with its own parameter groups"


@pytest.mark.parametrize(("world", "device", "steps"), [(1, 16, 8), (8, 16, 1), (4, 4, 8)])
def test_the_global_batch_is_the_same_for_any_number_of_processes(world: int, device: int, steps: int) -> None:
    section = parse_config(
        {**GOOD, "trainer": {"global_batch_size": 128, "per_device_train_batch_size": device}}
    ).trainer
    assert accumulation_steps(section, world)["gradient_accumulation_steps"] == steps
    with pytest.raises(ValueError, match="can't be divided among 3 processes; use a multiple of 3"):
        accumulation_steps(section, 3)


def test_help_lists_every_key() -> None:
    text = describe_config()
    for key in (
        "output_dir",
        "model.path",
        "zip.dominant",
        "data.sources[0].fraction",
        "train.lora.r",
        "trainer.resume",
    ):
        assert key in text
    assert "Annotated" not in text


def test_help_lists_what_training_arguments_most_runs_set_and_what_the_recipes_set_them_to() -> None:
    lines = describe_config().splitlines()
    for name in IMPORTANT:
        assert any(line.startswith(f"  trainer.{name}: ") for line in lines), name
    assert "  trainer.learning_rate: float = 5e-05  peak of the schedule" in lines
    assert any(line.startswith("  trainer.logging_steps: int = 1 ") for line in lines), (
        "the default here, not transformers'"
    )
    assert any("every key of transformers' TrainingArguments is accepted" in line for line in lines)
    head = next(line for line in lines if line.startswith("recipe "))
    assert head.split()[1:] == list(COMPARED)
    row = next(line for line in lines if line.startswith("llava-1.5-7b/ft-64.yaml "))
    assert row.split()[1:] == ["2e-05", "1", "-", "128", "16", "0.03"]


def test_print_config_and_help_on_the_command_line() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "train.py", *arguments],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )

    shown = run("--config", "configs/tiny-llava/demo.yaml", "--print-config", "seed=5")
    assert shown.returncode == 0
    assert "seed: 5" in shown.stdout
    assert "hang_timeout: 900" in shown.stdout, "defaults are resolved"
    wrong = run("--config", "configs/tiny-llava/demo.yaml", "sed=5")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean seed?" in wrong.stderr


def test_defaults_pass_on_to_training_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config: RunConfig = parse_config({**GOOD, "trainer": {"deepspeed": "off", "weight_decay": 0.1, "logging_steps": 7}})
    args = training_arguments(config.trainer, output_dir=str(tmp_path), seed=3, dtype="float32", world_size=1)
    assert (args.weight_decay, args.logging_steps, args.seed) == (0.1, 7, 3)
    assert args.average_tokens_across_devices
    assert not args.logging_nan_inf_filter


def test_zero3_is_known_by_what_a_deepspeed_config_says(tmp_path: Path) -> None:
    """Not by its name alone: a file of one's own may be called anything."""
    own = tmp_path / "mine.json"
    for stage, sharded in ((2, False), (3, True)):
        own.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        assert TrainerSection(deepspeed=str(own)).sharded == sharded
    own.write_text("{}")
    named = {stage: TrainerSection(deepspeed=stage).sharded for stage in (*STAGES, str(own))}
    assert {stage for stage, sharded in named.items() if sharded} == {s for s in STAGES if s.startswith("zero3")}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"optimizer": {"type": "Lamb"}}, "remove the optimizer section"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove the scheduler section"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "NVMe (offload_param), which is not",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "NVMe (offload_optimizer)"),
        ([], "contains a list; expected a JSON object"),
    ],
)
def test_what_a_deepspeed_config_may_not_say(tmp_path: Path, content: Any, says: str) -> None:
    """The optimizer of such a section was used instead of the trainer section's, whatever that said."""
    (tmp_path / "own.json").write_text(json.dumps(content))
    assert says in mistakes(trainer={"deepspeed": str(tmp_path / "own.json")})


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [("cosine", {"num_cicles": 1}), ("cosine_with_min_lr", {}), ("polynomial", {"lr_end": 1.0})],
)
def test_scheduler_options_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, options: dict[str, Any]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    given = {"deepspeed": "off", "lr_scheduler_type": scheduler, "lr_scheduler_kwargs": options}
    config = parse_config({**GOOD, "trainer": given})
    with pytest.raises(ValueError, match="lr_scheduler_kwargs: "):
        training_arguments(config.trainer, output_dir=str(tmp_path), seed=3, dtype="float32", world_size=1)


def test_liger_that_is_not_installed_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    config = parse_config({**GOOD, "trainer": {"deepspeed": "off", "use_liger_kernel": True}})
    with pytest.raises(ValueError, match="use_liger_kernel: liger-kernel is not installed; pip install liger-kernel"):
        training_arguments(config.trainer, output_dir=str(tmp_path), seed=3, dtype="float32", world_size=1)


def test_an_override_of_another_kind_takes_the_place_of_what_is_there(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("zip: {dominant: 5, budgets: [4, 8]}\neval: null\n")
    found = read_config_file(path, ["zip.budgets={least: 4, most: 8}", "eval={batch_size: 2}", "zip={contextual: 1}"])
    assert found["zip"] == {"dominant": 5, "budgets": {"least": 4, "most": 8}, "contextual": 1}
    assert found["eval"] == {"batch_size": 2}
    assert read_config_file(path, ["zip.budgets=[2]"])["zip"]["budgets"] == [2]


def test_overrides_reach_into_lists_and_read_numbers_as_yaml_does(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nmodel: {path: m}\ndata: {sources: [{path: a.json}]}\n")
    config = load_config(path, ["data.sources.0.path=b.json", "trainer.learning_rate=1e-4", "zip.dominant=5"])
    assert config.data.sources[0].path == "b.json"
    assert config.trainer.model_dump()["learning_rate"] == 1e-4
    assert config.zip.dominant == 5


def test_lora_can_be_written_as_yaml_reads_it(tmp_path: Path) -> None:
    """A bare `on` is a boolean in YAML 1.1; here it is the key it looks like, in a file and on the command line."""
    text = "output_dir: x\nmodel: {path: m}\ndata: {sources: [{path: d}]}\n"
    (tmp_path / "file.yaml").write_text(text + "train:\n  lora:\n    on: [llm]\n    r: 4\n")
    (tmp_path / "bare.yaml").write_text(text)
    for config in (
        load_config(tmp_path / "file.yaml"),
        load_config(tmp_path / "bare.yaml", ["train.lora={on: [llm], r: 4}"]),
        load_config(tmp_path / "bare.yaml", ["train.lora.on=[llm]", "train.lora.r=4"]),
    ):
        assert config.train.lora is not None
        assert (config.train.lora.on, config.train.lora.r) == (["llm"], 4)


@pytest.mark.parametrize("section", ["zip", "data"])
@pytest.mark.parametrize("value", [True, False, "auto"])
def test_pad_images_is_one_switch(section: str, value: Any) -> None:
    """What prepares the images of a run and what its projector remembers are the same, whichever section says it."""
    given = {**GOOD, section: {**GOOD.get(section, {}), "pad_images": value}}
    config = parse_config(given)
    assert config.zip.pad_images == config.data.pad_images == value
    again = parse_config(config.model_dump())
    assert again.zip.pad_images == again.data.pad_images == value


def test_pad_images_said_twice_in_two_ways_is_refused() -> None:
    data = {**GOOD["data"], "pad_images": True}
    assert "zip.pad_images is False and data.pad_images True: they are the same" in mistakes(
        zip={"pad_images": False}, data=data
    )
    assert "image_aspect_ratio is called pad_images now: true for pad" in mistakes(
        data={**GOOD["data"], "image_aspect_ratio": "pad"}
    )


def test_the_earlier_name_of_report_images_is_read() -> None:
    assert ReportSection.model_validate({"pictures": 2}).images == 2
    assert ReportSection.model_validate({"pictures": 2, "images": 3}).images == 3
