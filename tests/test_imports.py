"""Imports go one way (docs/architecture.md), and importing has no side effects worth the name."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Each layer may import itself and what stands before it. Files of the library that are not listed are found by name.
LIBRARY = [
    {
        "registry",
        "merges",
        "config",
        "budgets",
        "argument_types",
        "version",
        "words",
        "decode",
        "device",
        "intercept",
        "images",
        "video",
        "inputs",
        "prompts",
        "templates",
    },
    {"selectors"},
    {"compress"},
    {"encoders"},
    {"families"},
    {"shorten", "fingerprint", "manifest", "pretrained"},
    {"attach", "switch"},
    {"projector"},
    {"export", "hub"},
    {"loading", "description", "inspect_runs"},
    {"analysis"},
    {"cli", "commands", "chat", "app", "benchmark", "inspect", "lmms", "serving", "table", "__main__"},
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


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module → the modules of this repository that it imports, wherever in the file. Importing a name from a package counts as
    importing the package's own file, unless the name is a file in it."""
    files = {}
    for package in ("visionzip", "data", "train"):
        for path in sorted(root.glob(f"{package}/**/*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def module_of(name: str) -> str:
        return name if name in files else name.rpartition(".")[0]

    return {
        module: {module_of(name) for name in imported(path)} & files.keys() - {module} for module, path in files.items()
    }


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The largest sets of modules that each import, through others, all of the set."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reached(module) for module in graph}
    found: list[set[str]] = []
    for module in graph:
        circle = {other for other in reach[module] if module in reach[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def test_no_imports_in_circles():
    """Imports inside functions count: they hide a circle, they do not break it."""
    assert circles(import_graph(ROOT)) == []


def test_a_circle_is_seen(tmp_path):
    for name, text in {
        "visionzip/__init__.py": "from visionzip.a import f",
        "visionzip/a.py": "def f():\n    from visionzip.parts import g",
        "visionzip/parts/__init__.py": "from visionzip.parts.b import g",
        "visionzip/parts/b.py": "import visionzip.a",
        "visionzip/c.py": "from visionzip import a",
        "train/d.py": "import train.d\nfrom visionzip import a",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles(import_graph(tmp_path)) == [{"visionzip.a", "visionzip.parts", "visionzip.parts.b"}]


def test_the_library_imports_only_its_core_dependencies_at_the_top():
    """Somebody who only uses a compressed model has torch, transformers, safetensors, pydantic and pillow.

    What an extra brings (matplotlib, gradio, av, peft) is imported inside the function that needs it.
    """
    core = {"torch", "transformers", "safetensors", "pydantic", "PIL", "numpy", "huggingface_hub", "visionzip"}
    plugin = ROOT / "visionzip" / "serving" / "vllm_model.py"  # imported by vLLM, and by nothing here
    for path in (ROOT / "visionzip").rglob("*.py"):
        assert not any("vllm_model" in name for name in imported(path)), path
        if path == plugin:
            continue
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
