"""Files that tools and newcomers read: CITATION.cff, CONTRIBUTING.md."""

import re
from pathlib import Path

import yaml

from visionzip.version import __version__

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
#: keys of the Citation File Format 1.2.0 (its schema guide), as far as they are used here
CITATION_KEYS = {"cff-version", "message", "title", "authors", "type", "version", "license", "abstract", "keywords", "references"}  # fmt: skip
REFERENCE_KEYS = {"type", "title", "authors", "collection-title", "conference", "year", "url", "identifiers"}
PERSON, ENTITY = {"given-names", "family-names"}, {"name"}


def test_the_citation_is_valid_and_current():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert set(citation) == CITATION_KEYS
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(isinstance(citation[key], str) and citation[key] for key in ("message", "title", "abstract"))
    assert citation["version"] == __version__
    assert f'version = "{__version__}"' in PYPROJECT
    assert f'license = "{citation["license"]}"' in PYPROJECT
    assert f'name = "{citation["title"]}"' in PYPROJECT
    (paper,) = citation["references"]
    assert set(paper) <= REFERENCE_KEYS
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["type"] == "conference-paper"
    assert paper["year"] == 2025
    assert paper["title"] == "VisionZip: Longer is Better but Not Necessary in Vision Language Models"
    assert paper["url"] == "https://arxiv.org/abs/2412.04467"
    assert f'"{paper["url"]}"' in PYPROJECT
    for author in citation["authors"] + paper["authors"]:
        assert set(author) in (PERSON, ENTITY)
        assert all(author.values()), author
    for item in paper["identifiers"]:
        assert set(item) == {"type", "value"}
        assert item["type"] in ("doi", "url", "swh", "other")


def test_the_guide_for_contributors_names_what_exists():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|visionzip|data|train|docs|\.ci)/[\w./-]*)`", guide)
    linked = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", guide)]
    assert len(named) > 10
    assert "docs/architecture.md" in linked
    assert [path for path in named + linked if not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"test", "lint"} <= set(re.findall(r"(?:`|\$ )make ([a-z-]+)", guide)) <= targets


def test_the_map_of_the_architecture_names_what_exists():
    """Ten likely tasks and more: for each the folder of the new file, how it is registered, and an example to start from."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = page.split("## Where to change what")[1].split("\n\n")[1].splitlines()[2:]
    assert len(rows) >= 10
    assert [row for row in rows if not named_paths(row)] == []
    missing = [path for path in named_paths(page) if not any((ROOT / part / path).exists() for part in FOLDERS)]
    assert missing == []


def find_own_styles(source: str) -> list[str]:
    """What a module decides by itself that `visionzip/analysis/style.py` decides for all: colours, pyplot's defaults, rc settings."""
    return re.findall(r"pyplot|rc_context|rcParams|plt\.|(?<=[\"'])#[0-9a-fA-F]{6}(?=[\"'])|\bcolor=[\"']\w+", source)


def test_every_plot_has_one_style():
    drawing = {}
    for folder in ("visionzip", "train", "data", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            if "analysis.style" in source or "matplotlib" in source:
                drawing[str(path.relative_to(ROOT))] = find_own_styles(source)
    style = drawing.pop("visionzip/analysis/style.py")
    assert "rc_context" in style
    assert "#0072B2" in style
    assert len(drawing) >= 10
    assert {path: found for path, found in drawing.items() if found} == {}


#: the page names files from the folder that a section is about
FOLDERS = ("", "visionzip", "visionzip/export", "visionzip/serving", "data")


def named_paths(text: str) -> list[str]:
    """Files and folders in backticks; patterns with a placeholder are none."""
    return re.findall(r"`([\w.-]+/[\w./-]*|[\w/-]+\.(?:py|md|sh|json))`", text)
