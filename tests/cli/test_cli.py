"""The dispatcher, and what is true of every command."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, cli, save
from visionzip.cli import library_commands, main
from visionzip.export import read_export
from visionzip.merges import MERGES
from visionzip.selectors import SELECTORS

ROOT = Path(__file__).parents[2]
OURS = (
    "analyze", "app", "benchmark", "chat", "export", "inspect", "pull", "push", "serve", "table", "visualize",
)  # fmt: skip


def test_every_command_has_a_line_that_says_what_it_does(capsys):
    assert set(OURS) == set(library_commands())
    assert main([]) == 2
    printed = capsys.readouterr().out
    for name, line in {**library_commands(), **cli.program_commands()}.items():
        assert 20 < len(line) < 100
        assert f"  {name:<11} {line}" in printed


@pytest.mark.parametrize("name", OURS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"usage: visionzip {name} ")
    assert f"\n  visionzip {name} " in rest, "an example"


@pytest.mark.parametrize("command", ["chat", "benchmark", "visualize"])
def test_help_lists_selectors_and_merges(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--selector NAME how dominant tokens are chosen: " in said
    for registry in (SELECTORS, MERGES):
        assert ", ".join(registry.names()) in said


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, "visionzip-ft 0.1.0\n")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("chatt", "no command 'chatt'; did you mean chat?"),
        ("evalute", "no command 'evalute'; did you mean evaluate?"),
        ("xyz", "no command 'xyz'; there are analyze, app, "),
    ],
)
def test_did_you_mean(typed, hint, capsys):
    with pytest.raises(SystemExit) as left:
        main([typed])
    assert left.value.code == 2
    assert f"visionzip: error: {hint}" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.PROGRAM)
def test_a_wheel_without_the_program_says_how_to_get_it(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert main([name, "--config", "x.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"visionzip {name}: {name} is part of the training program")
    assert main([]) == 2
    assert "train, evaluate, budget, sweep: from a checkout" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["chat", "--help"], ["nonsense"]])
def test_help_is_quick(arguments):
    """It imports none of the libraries that the commands need."""
    script = (
        "import sys\n"
        "from visionzip.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'gradio', 'matplotlib'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "visionzip" in done.stdout + done.stderr


def test_the_package_gives_its_functions_not_the_files_of_the_same_name():
    script = (
        "import visionzip.attach, visionzip.loading\n"
        "import visionzip as package\n"
        "from visionzip import *\n"
        "assert attach is package.attach is sys.modules['visionzip.attach'].attach\n"
        "assert visionzip is package.visionzip and load is package.load\n"
        "assert not hasattr(package, 'nonsense') and set(package.__all__) <= set(dir(package))"
    )
    done = subprocess.run([sys.executable, "-c", f"import sys\n{script}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["inspect"], ["export", "x"], ["chat"]])
def test_wrong_use_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: visionzip" in capsys.readouterr().err


def test_bad_input_is_2_and_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert (
        error == f"visionzip inspect: there is nothing at {tmp_path / 'nowhere'}, and it is not a hub id (owner/name)\n"
    )


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "visionzip", "inspect", "/"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a directory of a kind this toolkit does not know" in done.stdout


class TestExport:
    @pytest.fixture
    def projector(self, tmp_path):
        tiny_llava().save_pretrained(tmp_path / "base")
        tiny_processor().save_pretrained(tmp_path / "base")
        model = tiny_llava()
        model.config._name_or_path = str(tmp_path / "base")
        return save(attach(model, tiny_processor(), ZipConfig(dominant=5, contextual=3)), tmp_path / "projector")

    def test_all_formats(self, projector, tmp_path, capsys):
        for name, options in (("merged", []), ("peft", []), ("llava", ["--vision-tower", "x"]), ("safetensors", [])):
            out = tmp_path / f"llava-{name}"
            assert main(["export", str(projector), "--format", name, "--out", str(out), *options]) == 0
            printed = capsys.readouterr().out.splitlines()
            assert printed[0] == f"{out}  ({name})"
            assert {line.split()[0] for line in printed[1:]} == {path.name for path in out.iterdir()}
            read_export(out)

    def test_help_lists_every_format(self, capsys):
        """Read from the formats' files, so that a new one is listed by being there."""
        from visionzip.export import FORMATS

        with pytest.raises(SystemExit):
            main(["export", "--help"])
        listed = capsys.readouterr().out.split("formats:")[1]
        assert sorted(line.split()[0] for line in listed.strip().splitlines()) == FORMATS.names()

    def test_overwrite(self, projector, tmp_path, capsys):
        command = ["export", str(projector), "--out", str(tmp_path / "again")]
        assert main(command) == 0
        assert main(command) == 2
        assert "already exists and is not empty" in capsys.readouterr().err
        assert main([*command, "--overwrite"]) == 0

    def test_base(self, projector, tmp_path, capsys):
        (tmp_path / "base").rename(tmp_path / "moved")
        command = ["export", str(projector), "--format", "merged", "--out", str(tmp_path / "merged")]
        assert main(command) == 2
        assert "pass base=... if it is elsewhere" in capsys.readouterr().err
        assert main([*command, "--base", str(tmp_path / "moved")]) == 0
        command[-1] = str(tmp_path / "llava-x")
        command[3] = "llava"
        assert main([*command, "--vision-tower", "x", "--base", str(tmp_path / "moved")]) == 0

    def test_another_base(self, projector, tmp_path, capsys):
        tiny_llava(seed=1).save_pretrained(tmp_path / "other")
        tiny_processor().save_pretrained(tmp_path / "other")
        command = [
            "export",
            str(projector),
            "--format",
            "merged",
            "--out",
            str(tmp_path / "x"),
            "--base",
            str(tmp_path / "other"),
        ]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "was trained for something else" in error
        assert "llm: " in error
        assert main([*command, "--force"]) == 0


class TestProgram:
    """Commands of the training program, found in the checkout."""

    def test_all_are_there(self):
        assert list(cli.program_commands()) == list(cli.PROGRAM)

    @pytest.mark.parametrize("name", cli.PROGRAM)
    def test_help(self, name, capsys):
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
        usage, _, rest = capsys.readouterr().out.partition("\n\n")
        assert usage.startswith(f"usage: visionzip {name} ")
        assert f"\n  visionzip {name} " in rest, "an example"

    @pytest.mark.parametrize("name", [name for name in cli.PROGRAM if name not in ("init", "budget")])
    def test_a_config_that_is_not_there(self, name, tmp_path):
        """In a process of its own: a training run ends the one it is in."""
        out = ["seed=0,1", "--out", str(tmp_path / "out")] if name == "sweep" else []
        command = [sys.executable, "-m", "visionzip", name, "--config", str(tmp_path / "no.yaml"), *(out or ["key=1"])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert (
            done.stderr
            == f"config error: there is no config file {tmp_path / 'no.yaml'}; see configs/ for the ready ones\n"
        )

    def test_train_and_its_script_are_one(self, capsys):
        path, change = "configs/tiny-llava/demo.yaml", "trainer.learning_rate=1.0e-3"
        script = [sys.executable, "train.py", "--config", path, "--print-config", change]
        done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
        assert main(["train", "--config", str(ROOT / path), change, "--print-config"]) == 0
        assert capsys.readouterr().out == done.stdout
        assert "learning_rate: 0.001" in done.stdout

    def test_from_another_directory(self, tmp_path):
        """The console script has its own directory on the path, not the checkout."""
        script = f"import sys; sys.path[:] = [p for p in sys.path if p] + [{str(tmp_path)!r}]\nfrom visionzip.cli import main\nmain()"
        (tmp_path / "data.py").write_text("raise SystemExit('another data')")
        done = subprocess.run(
            [sys.executable, "-c", script, "plan", "--config", "no.yaml"], cwd=tmp_path, capture_output=True, text=True
        )
        assert "no.yaml" in done.stderr
        assert "another data" not in done.stderr
