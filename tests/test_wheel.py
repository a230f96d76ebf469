"""The wheel holds the library and nothing else: a wheel with packages called `train` and `data` breaks other people's code."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from visionzip.version import __version__

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("visionzip", "train", "data", "tests"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "tiny-llava*", "reference")
        )
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from setuptools import build_meta as b; print(b.build_wheel(sys.argv[1]))",
            out,
        ],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel unpacked into a folder of its own, as pip would do it; its dependencies are this environment's."""
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_top_level_of_the_wheel(wheel):
    assert wheel.name.startswith("visionzip_ft-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"visionzip"}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "visionzip").rglob("*.py")}
    assert library | {"visionzip/py.typed"} <= set(names)


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    links = dict(link.split(", ") for link in metadata.get_all("Project-URL"))
    assert links["Paper"] == "https://arxiv.org/abs/2412.04467"
    assert all(link.startswith("https://") for link in links.values())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_an_installed_wheel_runs_and_has_what_the_api_page_imports(installed):
    imports = library_imports(ROOT / "docs" / "api.md")
    assert {"import visionzip", "from visionzip.inspect import describe", "from visionzip.chat import Chat"} <= imports
    script = """
import sys
from importlib.metadata import distribution
(program,) = distribution("visionzip-ft").entry_points.select(group="console_scripts")
try:
    program.load()(["--version"])
except SystemExit as done:
    assert done.code == 0
print(sys.modules["visionzip"].__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([script, *sorted(imports)])],
        cwd=installed, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    version, place = done.stdout.splitlines()
    assert version == f"visionzip-ft {__version__}"
    assert Path(place).is_relative_to(installed)


def library_imports(page: Path) -> set[str]:
    """Statements that import something of the library in the Python blocks of a page."""
    found = set()
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        try:
            nodes = list(ast.walk(ast.parse(block)))
        except SyntaxError:  # an outline, with dots in it
            continue
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.names[0].name if isinstance(node, ast.Import) else node.module
                found |= {ast.unparse(node)} if module.split(".")[0] == "visionzip" else set()
    return found


def test_extras_that_are_named_exist():
    """A command that messages and docs tell people to run: pip would warn of an unknown extra, and install without it."""
    extras = set(
        re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    )
    files = [path for kind in ("*.py", "*.md", "*.yaml") for path in ROOT.rglob(kind) if ".venv" not in path.parts]
    named = {name for path in files for name in re.findall(r"visionzip-ft\[(\w+)\]", path.read_text(encoding="utf-8"))}
    assert {"quant", "viz"} <= named <= extras
