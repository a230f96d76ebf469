"""The walk through in docs/api.md runs, and prints what it says it prints."""

from pathlib import Path

import pytest

import visionzip
from scripts.run_docs import run

DOCS = Path(__file__).parents[2] / "docs"


def test_the_python_api_page():
    made, differences = run((DOCS / "api.md").read_text())
    assert differences == []
    assert made.count("```text") >= 10


def test_a_page_that_is_wrong_is_seen(tmp_path):
    page = "# x\n\n```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n\nand\n\n```python\na = 5\n```\n"
    made, differences = run(page)
    assert differences == ["block at line 4: expected '3\\n', printed '2\\n'"]
    assert made == page.replace("3\n", "2\n")
    with pytest.raises(ZeroDivisionError):
        run("```python\n1 / 0\n```\n")


def test_the_reference_has_the_whole_public_api():
    page = (DOCS / "reference.md").read_text()
    listed = {line.split(".")[-1] for line in page.splitlines() if line.startswith("::: ")}
    assert set(visionzip.__all__) - {"__version__"} <= listed
