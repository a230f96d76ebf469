"""The wheel holds the library and nothing else: a wheel with packages called `train` and `data` breaks other people's code."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_top_level_of_the_wheel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("visionzip", "train", "data", "tests"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "tiny-llava*", "reference")
        )
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from setuptools import build_meta as b; print(b.build_wheel(sys.argv[1]))",
            tmp_path,
        ],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("visionzip_ft-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"visionzip"}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "visionzip").rglob("*.py")}
    assert library <= set(names)


def test_extras_that_are_named_exist():
    """A command that messages and docs tell people to run: pip would warn of an unknown extra, and install without it."""
    extras = set(
        re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    )
    files = [path for kind in ("*.py", "*.md", "*.yaml") for path in ROOT.rglob(kind) if ".venv" not in path.parts]
    named = {name for path in files for name in re.findall(r"visionzip-ft\[(\w+)\]", path.read_text(encoding="utf-8"))}
    assert {"quant", "viz"} <= named <= extras
