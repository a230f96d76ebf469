"""Write `docs/models.md`: which family of models has which property, as the tests of `tests/families` find it.

python -m scripts.models_page            runs those tests and writes the page
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
TEMPLATE = ROOT / "docs" / "models.in.md"
TUNED = ROOT / "data" / "tiny-llava-next" / "results.json"
MAKE, TUNE = "scripts.make_tiny_llava_next", "scripts.tune_tiny_llava_next"
#: property (the test is called test_<property>) → head of its column
COLUMNS = {
    "selection": "selection",
    "everything": "all kept",
    "sdpa_eager": "SDPA = eager",
    "placeholders": "placeholders",
    "generate": "generate",
    "mixed_batch": "mixed batch",
    "multi_turn": "turns",
    "attach_detach": "detach",
    "save_load": "save, load",
    "gradient": "gradient",
    "frozen": "frozen",
    "token_cache": "token cache",
    "video": "video",
    "zero3": "ZeRO-3",
}
Results = dict[tuple[str, str], bool]


def run_tests() -> Results:
    """(property, family) → passed, from a run of the tests themselves."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        files = ["tests/families/test_properties.py", "tests/families/test_zero3.py"]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *files, f"--junitxml={report}"], cwd=ROOT, check=False)
        found: Results = {}
        for test in ElementTree.parse(report).iter("testcase"):
            name = re.fullmatch(r"test_(\w+)\[(.+)\]", test.get("name", ""))
            if name:
                found[name[1], name[2]] = not any(child.tag in ("failure", "error", "skipped") for child in test)
    return found


def every_test_passed() -> Results:
    """What `run_tests` gives when nothing fails."""
    from tests.families.case import cases

    return {(column, case.name): True for case in cases() for column in COLUMNS if column not in case.exempt}


def render(results: Results) -> str:
    """The page."""
    from tests.families.case import cases

    found = cases()
    reasons: list[str] = []  # in the order of their numbers
    rows = []
    for case in found:
        cells = []
        for column in COLUMNS:
            if column in case.exempt:
                if case.exempt[column] not in reasons:
                    reasons.append(case.exempt[column])
                cells.append(f"({reasons.index(case.exempt[column]) + 1})")
            else:
                cells.append({True: "✓", False: "**fails**", None: "**not run**"}[results.get((column, case.name))])
        rows.append([case.name, *cells])
    parts = {
        "families": table(
            ["family", "transformers class", "what is special", "checkpoints"], [described(case) for case in found]
        ),
        "properties": table(["family", *COLUMNS.values()], rows),
        "exempt": "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)),
        "explained": "\n".join(f"- **{head}**: {first_line(column)}" for column, head in COLUMNS.items()),
        "count": str(len(results)),
        "tuned": tuned(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], TEMPLATE.read_text(encoding="utf-8"))


def described(case: Any) -> list[str]:
    return [case.name, f"`{case.model_class}`", case.special, ", ".join(f"`{name}`" for name in case.checkpoints)]


def first_line(column: str) -> str:
    """Of the test's docstring."""
    from tests.families import test_properties, test_zero3

    test = getattr(test_properties, f"test_{column}", None) or getattr(test_zero3, f"test_{column}")
    return " ".join(test.__doc__.split())


def tuned() -> str:
    """The measured effect on the tiled sibling of the embedded model, where it was measured."""
    if not TUNED.exists():
        return f"Not measured in this checkout: `python -m {MAKE}`, then `python -m {TUNE}`, then this page again."
    found = json.loads(TUNED.read_text(encoding="utf-8"))
    head = ["tokens of an image", "training-free", "fine-tuned", "won back"]
    rows = [["all " + str(found["of_tokens"]), percent(found["full"]), "", ""]]
    for run in found["runs"]:
        lost, back = found["full"] - run["training_free"], run["fine_tuned"] - run["training_free"]
        rows.append(
            [
                f"{run['tokens']} (seed {run['seed']})",
                percent(run["training_free"]),
                percent(run["fine_tuned"]),
                percent(back / lost),
            ]
        )
    return "\n\n".join([found["about"], table(head, rows), f"Printed by `{found['command']}`."])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    results = run_tests()
    PAGE.write_text(render(results), encoding="utf-8")
    wrong = [name for name, passed in results.items() if not passed]
    print(f"{PAGE.relative_to(ROOT)}: {len(results)} cells, {len(wrong)} failing {wrong or ''}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
