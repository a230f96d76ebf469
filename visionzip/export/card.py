"""The model card that goes with every export: what it is, what it belongs to, what was measured, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionzip.budgets import ladder
from visionzip.config import ZipConfig
from visionzip.export.base import Format, is_run
from visionzip.export.header import Header
from visionzip.pretrained import looks_like_id

#: stands for the place of an export until it has one; `visionzip push` puts the repository's id in
HERE = "<this directory>"
#: the image of a card: a held-out image with its kept patches
KEPT = "kept.png"
#: a list of budgets that is longer is shortened to its ends
LISTED = 8

KEPT_IMAGE = f"""![A held-out image, its attention, the kept patches and the merged ones, with a question and the answers]({KEPT})

A held-out image: the encoder's attention, the patches that are kept, and those that are merged into contextual tokens."""

SET_BUDGET = """It was trained for several budgets: `visionzip.set_budget(model, 32)` changes the budget of model and processor without loading
anything again."""

COMMANDS = """On the command line, from a hub repository or a local directory alike:

| command | what it does |
|---|---|
| `visionzip chat {here} --image photo.jpg` | asks questions about an image |
| `visionzip app {here} --image photo.jpg` | serves a page that shows the kept patches and moves the budget (extra `viz`) |
| `visionzip serve {here}` | an OpenAI-compatible server on vLLM (`pip install vllm`); `--engine transformers` does without |
| `visionzip export {here} --format onnx --out onnx` | graphs for ONNX Runtime, which run without PyTorch (extra `onnx`) |
| `visionzip export {here} --format merged --out merged` | a whole model directory for `from_pretrained` |"""


def write_card(directory: Path, header: Header, form: Format, here: str | None = None) -> Path:
    """``README.md`` for an export of format `form`; `here` is how readers will refer to it (a path or a hub id)."""
    path = directory / "README.md"
    path.write_text(render_card(header, form, here or HERE, kept=(directory / KEPT).is_file()), encoding="utf-8")
    return path


def find_kept(place: Path) -> Path | None:
    """The image for the card of the export at `place`: one that lies beside it, or the first of the report of the run that it is
    the result of; None where neither exists."""
    folder = place if place.is_dir() else place.parent
    found = [folder / KEPT]
    if is_run(folder.parent):
        found.append(folder.parent / "report" / "kept_0.png")
    return next((path for path in found if path.is_file()), None)


def render_card(header: Header, form: Format, here: str, kept: bool = False) -> str:
    """Markdown with the front matter that hubs read; `kept`: there is a `KEPT` beside it."""
    base, metadata = header.base_model, header.metadata
    local = Path(base).is_absolute()  # says nothing to others, and more than they need to know
    title = f"{Path(base).name or 'A vision-language model'}, {budget_words(header.zip)}"
    front = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    if looks_like_id(base):
        front.append(f"base_model: {base}")
    front += ["tags:", *(f"- {tag}" for tag in ("visionzip", "vision-language", *form.tags)), "---"]
    named = f"`{Path(base).name}`, a local model" if local else f"`{base}`" if base else "not recorded"
    facts = [
        ("Base model", named),
        ("Visual tokens kept per image", budget_words(header.zip)),
        *([("Trained for", describe_budgets(header.zip))] if header.zip and header.zip.budgets else []),
        ("Settings", f"`{format_settings(header.zip)}`" if header.zip else "not recorded"),
        ("What was trained", format_value(metadata.get("trained", "the projector"))),
        ("Data", format_value(metadata.get("data", "not recorded"))),
        ("Steps", format_value(metadata.get("steps", "not recorded"))),
        ("Made with", f"visionzip-ft {header.toolkit_version}" if header.toolkit_version else "another toolkit"),
    ]
    parts = [
        "\n".join(front),
        f"# {title}",
        "The multimodal projector of this model was fine-tuned on compressed visual tokens (VisionZip-FT, arXiv 2412.04467); "
        "the vision tower and, unless said otherwise below, the language model are the base model's.",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts),
        "## Measured",
        results_table(metadata.get("results")),
        *([KEPT_IMAGE] if kept else []),
        "## Use",
        form.usage.format(here=here, budget=budget_arguments(header.zip)),
        *([SET_BUDGET] if form.loadable and header.zip and header.zip.budgets else []),
        *([COMMANDS.format(here=here)] if form.loadable else []),
        "## Limits",
        "It belongs to exactly this base model, encoder and budget; the toolkit refuses to load it onto another one. "
        "The base model's licence and limits apply.",
    ]
    return "\n\n".join(parts) + "\n"


def describe_budgets(config: ZipConfig) -> str:
    """``14 + 2, 27 + 5 or 54 + 10 tokens``, or the ends of a long list: ``8 + 0 to 64 + 0 tokens``."""
    budgets = [f"{dominant} + {contextual}" for dominant, contextual in ladder(config)]
    unit = "of the visual tokens" if isinstance(ladder(config)[0][0], float) else "tokens"
    if len(budgets) > LISTED:
        return f"{budgets[0]} to {budgets[-1]} {unit}"
    return " or ".join([", ".join(budgets[:-1]), budgets[-1]] if budgets[1:] else budgets) + f" {unit}"


def budget_words(config: ZipConfig | None) -> str:
    """``64 visual tokens (54 dominant + 10 contextual)``."""
    if config is None:
        return "compressed visual tokens"
    dominant, contextual = config.dominant, config.contextual
    if isinstance(dominant, float) or isinstance(contextual, float):
        return f"{dominant:.0%} + {contextual:.0%} of the visual tokens"
    return f"{dominant + contextual} visual tokens ({dominant} dominant + {contextual} contextual)"


def budget_arguments(config: ZipConfig | None) -> str:
    config = config or ZipConfig.model_validate({})
    return f"dominant={config.dominant}, contextual={config.contextual}"


def format_settings(config: ZipConfig) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.model_dump().items() if value is not None)


def format_value(value: Any) -> str:
    """Whatever was recorded, on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {format_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item) for item in value)
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def results_table(results: Any) -> str:
    """What a run measured (`results.json`), as Markdown."""
    names = {"full": "all tokens", "training_free": "compressed, not trained", "fine_tuned": "compressed, fine-tuned"}
    if not isinstance(results, dict) or not any(isinstance(results.get(name), int | float) for name in names):
        return "Nothing was measured when this was exported."
    lines = ["| | exact match | tokens per image |", "|---|---|---|"]
    for name, label in names.items():
        if isinstance(results.get(name), int | float):
            tokens = results.get("of_tokens" if name == "full" else "tokens", "")
            lines.append(f"| {label} | {100 * results[name]:.1f} % | {tokens} |")
    budgets = results.get("budgets")
    for budget, accuracy in budgets.items() if isinstance(budgets, dict) else ():
        if isinstance(accuracy, int | float):
            lines.append(
                f"| compressed to {format_value(budget)}, fine-tuned | {100 * accuracy:.1f} % | {format_value(budget)} |"
            )
    if isinstance(results.get("questions"), int):
        lines.append(
            f"\nOn {results['questions']:,} held-out questions"
            + (f", seed {results['seed']}." if "seed" in results else ".")
        )
    return "\n".join(lines)
