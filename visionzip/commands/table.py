"""turn lmms-eval's result files into the paper's table, with the published numbers beside them

  visionzip table full=runs/eval/full free=runs/eval/free-64 ft=runs/eval/ft-64 --budget 64

Each argument is a result file or a directory (searched for *results.json), with a label before `=` if you like. Shares are
relative to the run with all tokens (--model_args full=true), or to the published uncompressed scores if there is none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", help="[label=]file or directory")
    parser.add_argument("--full", metavar="LABEL", help="which of them used all tokens (default: the one that says so)")
    parser.add_argument("--budget", type=int, choices=(64, 128, 192), help="published rows of this budget only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of Markdown")
    parser.add_argument("--out", help="write the table to this file instead of printing it")


def run(arguments: argparse.Namespace) -> None:
    from visionzip.table import build_rows, render_markdown

    rows, of = build_rows(labelled(arguments.results), arguments.full, arguments.budget)
    if arguments.json:
        plain = [
            {
                "label": r.label,
                "published": r.published,
                "scores": r.scores,
                "shares": r.shares,
                "average_share": r.average,
            }
            for r in rows
        ]
        text = json.dumps({"shares_of": of, "rows": plain}, indent=2, ensure_ascii=False)
    else:
        text = render_markdown(rows, of)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def labelled(given: list[str]) -> dict[str, str]:
    """``ft=runs/x`` or ``runs/x`` → label and path.

    Raises:
        ValueError: for a label that is used twice.
    """
    found: dict[str, str] = {}
    for text in given:
        label, _, path = text.partition("=") if "=" in text and not Path(text).exists() else (Path(text).name, "", text)
        if label in found:
            raise ValueError(f"two results are called {label}; give them labels: a={found[label]} b={path}")
        found[label] = path
    return found
