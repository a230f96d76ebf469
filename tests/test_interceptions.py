"""What is changed on other people's objects is listed in docs/architecture.md, and in the library goes through one file."""

import ast
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from visionzip.intercept import Interceptions, Scoped

ROOT = Path(__file__).parent.parent
HOME = "visionzip/intercept.py"
HOOKS = re.compile(r"register_(module_|full_)?(forward|backward)")


def interceptions(source: str) -> Iterator[str]:
    """Kinds of interception in a file: hooks, attributes put on instances by name, classes, context variables, attention names,
    and uses of `visionzip.intercept`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if HOOKS.search(name):
                yield "hook"
            elif name.endswith("AttentionInterface.register"):
                yield "attention"
            elif name.split("[")[0].rpartition(".")[2] in ("ContextVar", "Scoped", "Interceptions"):
                yield name
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                written = ast.unparse(target)
                if "__dict__[" in written or written.endswith(".__class__") or "_hf_peft_config_loaded" in written:
                    yield written


def files() -> list[tuple[str, set[str]]]:
    found = [
        (path.relative_to(ROOT).as_posix(), set(interceptions(path.read_text(encoding="utf-8"))))
        for package in ("visionzip", "data", "train")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    return [(name, kinds) for name, kinds in found if kinds]


def listed() -> str:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return page.split("## Interceptions")[1].split("\n## ")[0]


def test_every_interception_is_listed():
    assert [name for name, _ in files() if f"`{name}`" not in listed() and name != HOME] == []


def test_nothing_is_listed_that_is_gone():
    installers = {
        name for row in listed().splitlines() if row.startswith("| ") for name in re.findall(r"`([a-z_/]+\.py)`", row)
    }
    assert installers, "the table is there"
    assert [
        name for name in installers if not any((ROOT / folder / name).is_file() for folder in (".", "visionzip"))
    ] == []


def test_the_library_has_one_home_for_hooks_and_context_variables():
    for name, kinds in files():
        if name.startswith("visionzip/") and name != HOME:
            assert not {kind for kind in kinds if kind == "hook" or "ContextVar" in kind}, name


def test_a_new_one_is_seen():
    source = (
        "m.register_forward_hook(f)\nx: ContextVar[int] = ContextVar[int]('x')\nm.__class__ = C\nm.__dict__['f'] = 1\n"
    )
    assert len(set(interceptions(source))) == 4


def test_undone_to_the_last():
    model = nn.Linear(2, 2)
    before, given = dict(model.__dict__), torch.ones(1, 2)
    expected = model(given)
    with suppress(KeyError), Interceptions() as put:
        put.replace(model, "extra_repr", lambda: "other")
        put.before_forward(model, lambda module, args, kwargs: ((args[0] * 0,), kwargs))
        put.after_forward(model, lambda module, args, output: output + 1)
        assert model.extra_repr() == "other"
        assert put.holds(model, "extra_repr")
        assert torch.equal(model(given)[0], model.bias + 1)
        raise KeyError
    assert torch.equal(model(given), expected)
    assert model.__dict__ == before


def test_scoped_values_nest_and_end():
    value: Scoped[int] = Scoped("value")
    with value.set(1):
        with suppress(KeyError), value.set(2):
            assert value.get() == 2
            raise KeyError
        assert value.get() == 1
    assert value.get() is None
