"""`onnx`: ONNX graphs for devices that run no PyTorch: pixels to visual tokens, and the LLM with its KV cache

``device.json`` says what a runtime has to know; `visionzip.device` is one, ``examples/device.py`` another in 40 lines. The vision graph
is pixels → encoder up to the layer that is read → selection → merge → projector, one for each budget; all graphs share one file of
weights, in which equal tensors are stored once.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch

from visionzip.attach import Attachment
from visionzip.budgets import ALL, at_budget, ladder, parse_budgets
from visionzip.config import ZipConfig
from visionzip.device.package import FORMAT, MANIFEST, TOKENIZER, read_package
from visionzip.export.base import FORMATS, Format, Trained
from visionzip.export.files import read_json, write_json
from visionzip.export.header import parse_header
from visionzip.export.onnx_graphs import OLDEST_OPSET, PRECISIONS, Weights, language_graph, quantize, vision_graph
from visionzip.export.onnx_text import image_settings, prompt_settings
from visionzip.manifest import find_damage, list_files
from visionzip.projector import required

WEIGHTS = "weights.data"
LANGUAGE = "language.onnx"
#: model types whose images are one tile, and whose prompts are plain causal text
SUPPORTED = ("idefics3", "llava", "smolvlm")


class Onnx(Format):
    name = "onnx"
    summary = "ONNX graphs for devices that run no PyTorch, with tokenizer and prompt"
    what = "ONNX graphs of a compressed model, for visionzip.device"
    markers = (MANIFEST,)
    whole = True
    loadable = False
    tags: ClassVar[tuple[str, ...]] = ("onnx",)
    usage = """With ONNX Runtime, without PyTorch (`pip install --no-deps visionzip-ft`, `pip install onnxruntime numpy pillow tokenizers`):

```python
from visionzip.device import load

print(load("{here}").ask("photo.jpg", "What is this?").text)
```

In a terminal: `visionzip chat --device {here} --image photo.jpg`. `device.json` says all that another runtime has to know."""

    def read(self, path: Path) -> Trained:
        package = read_package(path)
        return Trained(parse_header(package.facts.get("header", {}), path / MANIFEST), {})

    def write(self, trained: Trained, out: Path, *, model: Any = None, processor: Any = None, **options: Any) -> None:
        """Options: ``budgets`` (``"16,32,64"``, ``"all"`` among them; default: those that the projector was trained for), ``precision`` (``"float32"``,
        or by part, ``"vision=float32,language=int8"``), ``opset``."""
        if model is None or processor is None:
            raise ValueError("ONNX graphs are made of a whole model: pass the model and its processor")
        precision, opset = parse_precision(options.get("precision")), check_opset(options.get("opset"))
        attachment = check_exportable(required(in_float32(model)))
        configs = budgets_of(attachment.config, options.get("budgets"))
        graphs = {}
        for config in configs:
            graph = vision_graph(attachment, config, image_side(attachment), opset)
            graphs[ALL if config is None else str(graph.tokens)] = graph
        placeholder_config = next((config for config in configs if config is not None), attachment.config)
        save_tokenizer(processor, out)
        facts: dict[str, Any] = {
            "image": image_settings(processor, attachment.config, image_side(attachment)),
            "prompt": prompt_settings(processor, attachment, placeholder_config, out / TOKENIZER),
        }
        weights = Weights(out / WEIGHTS)
        budgets = {}
        for name, graph in graphs.items():
            file = f"vision-{name}.onnx"
            weights.save(quantize(graph.program, precision["vision"]), out / file)
            budgets[name] = {"file": file, "tokens": graph.tokens, **graph.split}
        language = language_graph(attachment, opset)
        weights.save(quantize(language.program, precision["language"]), out / LANGUAGE)
        weights.close()
        facts |= {
            "format": FORMAT,
            "model_type": attachment.model.config.model_type,
            "budgets": budgets,
            "default": default
            if (default := str(sum(attachment.family.budget(attachment.config)))) in budgets
            else next(iter(budgets)),
            "language": {"file": LANGUAGE, **language.sizes},
            "end_ids": end_ids(attachment.model, processor),
            "precision": precision,
            "header": trained.header.model_copy(update={"format": FORMAT, "digest": ""}).model_dump(mode="json"),
        }
        facts["files"] = list_files(out, sorted(path.name for path in out.iterdir()))
        write_json(out / MANIFEST, facts)

    def problems(self, path: Path) -> list[str]:
        return find_damage(path, read_json(path / MANIFEST).get("files", {}))


def budgets_of(config: ZipConfig, text: str | None) -> list[ZipConfig | None]:
    """The budgets that `text` names; without it all that the projector was trained for, if they are a list, else the current one.

    Raises:
        ValueError: for text that is not budgets.
    """
    if text:
        return parse_budgets(text, config)
    if config.budgets is not None and config.budgets.totals:
        return [at_budget(config, budget) for budget in ladder(config)]
    return [config]


def parse_precision(text: str | None) -> dict[str, str]:
    """``"int8"`` or ``"vision=float32,language=int8"`` → the precision of each part.

    Raises:
        ValueError: for a part or precision there is none of.
    """
    found = {"vision": "float32", "language": "float32"}
    for part in (text or "float32").replace(" ", "").split(","):
        name, _, value = part.rpartition("=")
        if value not in PRECISIONS or (name and name not in found):
            raise ValueError(
                f"precision {part!r} is not known; expected one of {', '.join(PRECISIONS)}, or by part: vision=float32,language=int8"
            )
        found |= dict.fromkeys([name] if name else list(found), value)
    return found


def check_opset(opset: int | str | None) -> int:
    """Raises ``ValueError`` for one that the graphs can't be written in."""
    if opset is None:
        return OLDEST_OPSET
    if int(opset) < OLDEST_OPSET:
        raise ValueError(
            f"opset {opset} is too old: the graphs use operators of opset {OLDEST_OPSET}; leave out --opset"
        )
    return int(opset)


def check_exportable(attachment: Attachment) -> Attachment:
    """Raise ``ValueError`` for a model or budget that no graph can be made of."""
    model_type = attachment.model.config.model_type
    if model_type not in SUPPORTED:
        raise ValueError(
            f"model type {model_type!r} can't be exported to ONNX; supported: {', '.join(SUPPORTED)} (other families cut images into "
            f"a varying number of tiles, or their attention is not plainly causal)"
        )
    if attachment.config.positions == "original":
        raise ValueError(
            "zip.positions=original can't be exported to ONNX: runtimes number visual tokens consecutively; train with "
            "positions=compact, or choose another format"
        )
    if getattr(attachment.model, "is_quantized", False):
        raise ValueError("the model is loaded in 8 or 4 bit; load it unquantised, and choose --precision")
    return attachment


def in_float32(model: Any) -> Any:
    """`model`, or a copy of it where it has weights of another precision: graphs are traced in float32."""
    kinds = {value.dtype for value in model.parameters() if value.is_floating_point()}
    return model if kinds <= {torch.float32} else copy.deepcopy(model).float()


def image_side(attachment: Attachment) -> int:
    """Pixels of a side of what the encoder takes."""
    return int(attachment.model.config.vision_config.image_size)


def end_ids(model: Any, processor: Any) -> list[int]:
    """Tokens that end an answer, as ``generate`` knows them."""
    found = model.generation_config.eos_token_id
    found = processor.tokenizer.eos_token_id if found is None else found
    return [int(token) for token in (found if isinstance(found, list | tuple) else [found]) if token is not None]


def save_tokenizer(processor: Any, out: Path) -> None:
    aside = out / "tokenizer"
    processor.tokenizer.save_pretrained(aside)
    shutil.move(aside / TOKENIZER, out / TOKENIZER)
    shutil.rmtree(aside)


FORMATS.register("onnx")(Onnx())
