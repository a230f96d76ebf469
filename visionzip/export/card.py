"""The model card that goes with every export: what it is, what it belongs to, what was measured, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: stands for the place of an export until it has one; `visionzip push` puts the repository's id in
HERE = "<this directory>"

USE = {
    "safetensors": """```python
import visionzip  # pip install visionzip-ft

model, processor = visionzip.load("{here}")
```

In a terminal: `visionzip chat {here} --image photo.jpg`.""",
    "merged": """This directory is a whole model. With the toolkit installed (`pip install visionzip-ft`) it compresses by itself:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{here}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{here}", trust_remote_code=True)
```

`visionzip.load("{here}")` does the same without running code from this repository.

**Without `trust_remote_code=True`, or without the toolkit, it loads as a plain model that uses every visual token.** It then
works, but slowly, and with a projector that was tuned for the compressed sequence. Load model and processor the same way.""",
    "peft": """```python
import visionzip  # pip install visionzip-ft peft

model, processor = visionzip.load("{here}")
```

Or with PEFT alone, which loads the weights and does not compress:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{here}")
```""",
    "llava": """In LLaVA's own repository, as any projector that was trained there (the directory's name must keep its "llava"):

```python
from llava.model.builder import load_pretrained_model

tokenizer, model, image_processor, _ = load_pretrained_model("{here}", "<the base LLM>", "llava")
```

LLaVA does not compress by itself; the authors' package does: `from visionzip import visionzip; model = visionzip(model, {budget})`.
With Hugging Face's version of the base model: `visionzip.load("{here}")` (`pip install visionzip-ft`).""",
}


def write_card(directory: Path, header: dict[str, Any], form: str, here: str | None = None) -> Path:
    """``README.md`` for an export of format `form`; `here` is how readers will refer to it (a path or a hub id)."""
    path = directory / "README.md"
    path.write_text(card(header, form, here or HERE), encoding="utf-8")
    return path


def card(header: dict[str, Any], form: str, here: str) -> str:
    """Markdown with the front matter that hubs read."""
    base, metadata = header["base_model"], header["metadata"]
    title = f"{Path(base).name or 'A vision-language model'}, {budget_words(header['zip'])}"
    front = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    if "/" in base and not base.startswith((".", "/")) and base.count("/") == 1:
        front.append(f"base_model: {base}")
    front += ["tags:", "- visionzip", "- vision-language", *(["- peft"] if form == "peft" else []), "---"]
    facts = [
        ("Base model", f"`{base}`" if base else "not recorded"),
        ("Kept of a picture", budget_words(header["zip"])),
        ("Settings", f"`{settings(header['zip'])}`" if header["zip"] else "not recorded"),
        ("What was trained", words(metadata.get("trained", "the projector"))),
        ("Data", words(metadata.get("data", "not recorded"))),
        ("Steps", words(metadata.get("steps", "not recorded"))),
        ("Made with", f"visionzip-ft {header['toolkit_version']}" if header["toolkit_version"] else "another toolkit"),
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
        USE[form].format(here=here, budget=budget_arguments(header["zip"])),
        "## Limits",
        "It belongs to exactly this base model, encoder and budget; loading it onto another is refused by the toolkit. "
        "The base model's licence and limits apply.",
    ]
    return "\n\n".join(parts) + "\n"


def budget_words(stored: dict[str, Any] | None) -> str:
    """``64 visual tokens (54 + 10)``."""
    if not stored:
        return "compressed visual tokens"
    dominant, contextual = stored["dominant"], stored["contextual"]
    if isinstance(dominant, float) or isinstance(contextual, float):
        return f"{dominant:.0%} + {contextual:.0%} of the visual tokens"
    return f"{dominant + contextual} visual tokens ({dominant} dominant + {contextual} contextual)"


def budget_arguments(stored: dict[str, Any] | None) -> str:
    stored = stored or {"dominant": 54, "contextual": 10}
    return f"dominant={stored['dominant']}, contextual={stored['contextual']}"


def settings(stored: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in stored.items() if value is not None)


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
    lines = ["| | exact match | tokens a picture |", "|---|---|---|"]
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
