"""The model card that goes with every export: what it is, what it belongs to, what was measured, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionzip.config import ZipConfig
from visionzip.export.base import Format
from visionzip.export.header import Header
from visionzip.pretrained import looks_like_id

#: stands for the place of an export until it has one; `visionzip push` puts the repository's id in
HERE = "<this directory>"


def write_card(directory: Path, header: Header, form: Format, here: str | None = None) -> Path:
    """``README.md`` for an export of format `form`; `here` is how readers will refer to it (a path or a hub id)."""
    path = directory / "README.md"
    path.write_text(card(header, form, here or HERE), encoding="utf-8")
    return path


def card(header: Header, form: Format, here: str) -> str:
    """Markdown with the front matter that hubs read."""
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
        ("Settings", f"`{settings(header.zip)}`" if header.zip else "not recorded"),
        ("What was trained", words(metadata.get("trained", "the projector"))),
        ("Data", words(metadata.get("data", "not recorded"))),
        ("Steps", words(metadata.get("steps", "not recorded"))),
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
        "## Use",
        form.usage.format(here=here, budget=budget_arguments(header.zip)),
        "## Limits",
        "It belongs to exactly this base model, encoder and budget; the toolkit refuses to load it onto another one. "
        "The base model's licence and limits apply.",
    ]
    return "\n\n".join(parts) + "\n"


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


def settings(config: ZipConfig) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.model_dump().items() if value is not None)


def words(value: Any) -> str:
    """Whatever was recorded, on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {words(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(words(item) for item in value)
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
    if isinstance(results.get("questions"), int):
        lines.append(
            f"\nOn {results['questions']:,} held-out questions"
            + (f", seed {results['seed']}." if "seed" in results else ".")
        )
    return "\n".join(lines)
