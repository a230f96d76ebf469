"""Imports go one way (docs/architecture.md), and importing has no side effects worth the name."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Each layer may import itself and what stands before it. Files of the library that are not listed are found by name.
LIBRARY = [
    {"registry", "config", "pictures", "budgets"},
    {"selectors"},
    {"compress", "adaptive"},
    {"encoders"},
    {"families"},
    {"shorten", "fingerprint"},
    {"attach"},
    {"projector"},
    {"export", "hub"},
    {"loading"},
    {"analysis"},
    {"cli", "commands", "chat", "app", "benchmark", "describe", "lmms", "table", "__main__"},
]
PROGRAM = [{"visionzip"}, {"data"}, {"train"}]


def imported(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(name: str, layers: list[set[str]]) -> int | None:
    return next((index for index, names in enumerate(layers) if name in names), None)


def wrong_ways(root: Path) -> list[str]:
    found = []
    for path in sorted(root.glob("visionzip/**/*.py")):
        parts = path.relative_to(root / "visionzip").with_suffix("").parts
        if parts == ("__init__",):
            continue  # the public API: it may import everything of the library
        here = layer_of(parts[0], LIBRARY)
        if here is None:
            found.append(f"{path.relative_to(root)} has no layer in tests/test_imports.py")
            continue
        for name in imported(path):
            package, _, rest = name.partition(".")
            if package in ("train", "data"):
                found.append(f"{path.relative_to(root)} imports {name}")
            if package == "visionzip":
                there = layer_of(rest.split(".")[0], LIBRARY)
                if there is not None and there > here:
                    found.append(f"{path.relative_to(root)} imports {name}")
    for package in ("data", "train"):
        here = layer_of(package, PROGRAM)
        for path in sorted(root.glob(f"{package}/**/*.py")):
            for name in imported(path):
                there = layer_of(name.split(".")[0], PROGRAM)
                if (there is not None and there > here) or name.split(".")[0] == "scripts":
                    found.append(f"{path.relative_to(root)} imports {name}")
    return found


def test_imports_go_one_way():
    assert wrong_ways(ROOT) == []


def test_a_wrong_import_is_seen(tmp_path):
    for name, text in {
        "visionzip/compress.py": "from visionzip.families import Family",
        "visionzip/selectors/x.py": "def f():\n    import data.sample",
        "data/a.py": "from train.config import RunConfig",
        "visionzip/unheard_of.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert len(wrong_ways(tmp_path)) == 4


def test_the_library_imports_only_its_core_dependencies_at_the_top():
    """Somebody who only uses a compressed model has torch, transformers, safetensors, pydantic and pillow.

    What an extra brings (matplotlib, gradio, av, peft) is imported inside the function that needs it.
    """
    core = {"torch", "transformers", "safetensors", "pydantic", "PIL", "numpy", "huggingface_hub", "visionzip"}
    for path in (ROOT / "visionzip").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                for name in names:
                    top = name.split(".")[0]
                    assert top in core or top in sys.stdlib_module_names, f"{path}: {name}"


def test_importing_the_library_registers_everything():
    script = (
        "from visionzip.families import FAMILIES\n"
        "from visionzip.selectors import SELECTORS\n"
        "from visionzip.encoders import ENCODERS\n"
        "print(FAMILIES.names(), SELECTORS.names(), ENCODERS.names())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("llava", "visionzip", "CLIPVisionModel"):
        assert f"'{name}'" in done.stdout
