"""Every `python -m …` that the Makefile, the configs, the docs or a docstring names is a program, not a module that does nothing."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("data", "train", "visionzip", "scripts", "tests")


def named_modules() -> dict[str, str]:
    """Dotted module → the first file that names it."""
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    texts = [file for file in files if file == "Makefile" or file.endswith((".md", ".yaml", ".py", ".sh", ".sbatch"))]
    found: dict[str, str] = {}
    for file in texts:
        for module in re.findall(r"python -m ([a-z_]+(?:\.\w+)+)", (ROOT / file).read_text(encoding="utf-8")):
            if module.split(".")[0] in OURS:
                found.setdefault(module, file)
    return found


def is_program(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    if path.is_dir():
        return (path / "__main__.py").is_file()
    return path.with_suffix(".py").is_file() and '__name__ == "__main__"' in path.with_suffix(".py").read_text()


def test_modules_that_are_started_by_name_do_something():
    found = named_modules()
    assert {"data.cache", "data.commands.stamps", "scripts.make_smol_llava"} <= set(found)
    assert {module: file for module, file in found.items() if not is_program(module)} == {}
    assert not is_program("data.commands.cache")  # `run` alone: started so it would end well and have done nothing
