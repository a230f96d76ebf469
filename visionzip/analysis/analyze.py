"""`visionzip analyze`: how concentrated an encoder's attention is over many images, layer by layer.

The measurements of each image are one line of ``images.jsonl``, so an interrupted analysis can continue; table, plots and JSON
are made from that file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionzip.analysis import image_files, redundancy
from visionzip.analysis.attention import attention_by_layer
from visionzip.analysis.trace import Trace, image_inputs, trace
from visionzip.attach import Attachment, attached
from visionzip.fingerprint import short_digest
from visionzip.images import decode_image
from visionzip.projector import fingerprint

LINES = "images.jsonl"
TOP = 0.10
"""Share of the patches whose part of the attention is reported for each layer."""
_DIGITS = 5
#: Edges of the histogram of attention a patch has, in multiples of its image's average; what lies outside counts at the ends.
EDGES = torch.logspace(-10, 8, 73, base=2.0)


@dataclass
class Analysis:
    """What `analyze` found: one dict per image, the files that were skipped, and the number of images measured by an earlier run."""

    folder: Path
    head: dict[str, Any]
    lines: list[dict[str, Any]]
    skipped: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    maps: list[np.ndarray] = field(default_factory=list)  # for one image: (rows, columns) per layer


def analyze(
    model: Any, path: str | Path, out: str | Path, *, limit: int | None = None, progress: bool = True
) -> Analysis:
    """Measure every image in the folder `path` that is not yet in ``out/images.jsonl``, identified by name and content.

    Raises:
        ValueError: if nothing is attached, no image can be read, or `out` was made with another model or budget.
    """
    attachment = attached(model)
    if attachment is None or attachment.processor is None:
        raise ValueError(
            "the model needs a budget and its processor; call attach(model, processor, ZipConfig(...)) first"
        )
    found = image_files.find_images(path, limit, out)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    head = {"model": type(attachment.model).__name__, "encoder": short_digest({"encoder": fingerprint(attachment.model)["encoder"]}),
            "zip": attachment.config.model_dump(), "levels": list(redundancy.LEVELS), "edges": len(EDGES)}  # fmt: skip
    lines = _read(folder / LINES, head)
    contents = {name: content_of(found.root / name) for name in found.names}
    known = [line for line in lines if contents.get(line["name"]) == line["content"]]
    done = {line["name"] for line in known}
    todo = image_files.ImageFiles(found.root, [name for name in found.names if name not in done])
    result = Analysis(folder, head, known, resumed=len(done))

    with open(folder / LINES, "a", encoding="utf-8") as file:
        if not lines and not file.tell():
            file.write(json.dumps(head) + "\n")
        for name, image in _bar(todo, progress):
            line = {"content": contents[name], **measure_image(attachment, name, image)}
            file.write(json.dumps(line) + "\n")
            file.flush()  # if the process is killed, only the current image is lost
            result.lines.append(line)
    result.skipped = todo.skipped
    if not result.lines:
        raise ValueError(f"none of the {len(found.names)} file(s) at {path} is a readable image:\n{todo.summary()}")
    shown = result.lines[0]["name"]
    result.maps = layer_maps(attachment, decode_image(found.root / shown))
    return result


def content_of(path: Path) -> str:
    """A digest of an image file's content, to tell it from another of the same name; empty if there is no file to read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def measure_image(attachment: Attachment, name: str, image: Any) -> dict[str, Any]:
    """All measurements of one image; lists have one entry per layer, tiles are averaged."""
    layers = attention_by_layer(attachment, image_inputs(attachment.processor, image, attachment.config.pad_images))
    traced = trace(attachment.model, image, name=name)
    chosen = _scores(traced)
    keep = [int(tile.kept_mask.sum()) for tile in traced.tiles]
    per_tile = [torch.stack([layer[place] for layer in layers]) for place in range(len(layers[0]))]  # each (L, P)
    part = (
        keep[0] / traced.tiles[0].patches
    )  # patches of the encoder, which may be finer than the tokens that are selected from
    return {
        "name": name,
        "tiles": len(traced.tiles),
        "patches": traced.tiles[0].patches,
        "tokens": traced.tokens,
        "of_tokens": traced.of_tokens,
        "keep": keep[0],
        "held": _round(traced.held),
        "budgets": [_round(redundancy.budget_for(chosen, level).float().mean()) for level in redundancy.LEVELS],
        "curve": _round(redundancy.sample_curve(chosen).mean(dim=0)),
        "spread": _round(_histogram(chosen)),
        "top": _by_layer(per_tile, lambda layer: redundancy.top_share(layer, TOP)),
        "effective": _by_layer(per_tile, lambda layer: redundancy.effective_patches(layer) / layer.shape[-1]),
        "layer_budgets": [
            _by_layer(
                per_tile, lambda layer, level=level: redundancy.budget_for(layer, level).float() / layer.shape[-1]
            )
            for level in redundancy.LEVELS
        ],
        "agreement": _round(
            torch.stack([redundancy.agreement(one, max(1, round(part * one.shape[-1]))) for one in per_tile]).mean(
                dim=0
            )
        ),
    }


def layer_maps(attachment: Attachment, image: Any) -> list[np.ndarray]:
    """The attention of each layer on the patches of an image (its first tile), ``(rows, columns)``, if they form a grid."""
    inputs = image_inputs(attachment.processor, image, attachment.config.pad_images)
    layers = attention_by_layer(attachment, inputs)
    grid = trace(attachment.model, image).tiles[0].grid
    count = layers[0].shape[1]
    if count == grid[0] * grid[1]:
        return [layer[0].reshape(grid).numpy() for layer in layers]
    side = int(count**0.5)  # pooled before selection: the encoder's own grid is finer
    windows = bool(getattr(attachment.model.config.vision_config, "fullatt_block_indexes", None))
    return [] if side * side != count or windows else [layer[0].reshape(side, side).numpy() for layer in layers]


def summarize(analysis: Analysis) -> dict[str, Any]:
    """Means and spreads over the images: the content of ``analysis.json``."""
    lines = analysis.lines
    layers = len(lines[0]["top"])

    def stack(key: str) -> np.ndarray:
        return np.array([line[key] for line in lines], dtype=float)

    held = [line["held"] for line in lines if line["held"] is not None]
    budgets, patches = stack("budgets"), stack("patches")
    return {
        **analysis.head,
        "images": len(lines),
        "skipped": analysis.skipped,
        "patches_per_tile": _mean(patches),
        "kept_patches_per_tile": _mean(stack("keep")),
        "held_by_budget": _stats(np.array(held)) if held else None,
        "budget_for": {
            f"{level:.0%}": {"patches": _stats(budgets[:, place]), "share": _stats(budgets[:, place] / patches)}
            for place, level in enumerate(redundancy.LEVELS)
        },
        "curve": _rounded(stack("curve").mean(axis=0)),
        "spread": {"edges": _rounded(EDGES.numpy()), "share_of_patches": _rounded(stack("spread").mean(axis=0))},
        "layers": [
            {
                "layer": layer + 1,
                "top_10_percent_hold": _stats(stack("top")[:, layer]),
                "effective_share": _stats(stack("effective")[:, layer]),
                **{
                    f"share_for_{level:.0%}": _stats(stack("layer_budgets")[:, place, layer])
                    for place, level in enumerate(redundancy.LEVELS)
                },
            }
            for layer in range(layers)
        ],
        "agreement": [_rounded(row) for row in stack("agreement").mean(axis=0)],
    }


def render_summary(facts: dict[str, Any]) -> str:
    """The summary as Markdown: budgets, then one line per layer."""
    lines = [
        f"{facts['images']} images, {facts['patches_per_tile']:.0f} patches per image or tile; median and quartiles", "",
        "| attention held | patches needed | share of all |", "|---|---:|---:|",
    ]  # fmt: skip
    for level, found in facts["budget_for"].items():
        patches, share = found["patches"], found["share"]
        lines.append(
            f"| {level} | {patches['median']:.0f} ({patches['low']:.0f} … {patches['high']:.0f}) | {share['median']:.0%} |"
        )
    if facts["held_by_budget"]:
        kept = facts["kept_patches_per_tile"]
        lines.append(
            f"| {facts['held_by_budget']['median']:.0%} | {kept:.0f} (this budget) | {kept / facts['patches_per_tile']:.0%} |"
        )
    lines += [
        "",
        "| layer | the top 10 % hold | patches for 80 % | for 90 % | for 95 % | effective patches |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for layer in facts["layers"]:
        needed = " | ".join(f"{layer[f'share_for_{level:.0%}']['median']:.0%}" for level in redundancy.LEVELS)
        lines.append(
            f"| {layer['layer']} | {layer['top_10_percent_hold']['median']:.0%} | {needed} | {layer['effective_share']['median']:.0%} |"
        )
    return "\n".join(lines)


def write(analysis: Analysis, theme: str = "light", name: str = "") -> list[Path]:
    """``analysis.json``, ``analysis.md`` and the plots, into the folder of `analysis`. `name`: the model's, for titles."""
    from visionzip.analysis import analysis_plots
    from visionzip.analysis.style import save_figure, style

    facts = {**summarize(analysis), "name": name}
    folder = analysis.folder
    (folder / "analysis.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "analysis.md").write_text(render_summary(facts) + "\n", encoding="utf-8")
    with style(theme):
        drawn = [
            save_figure(figure, folder / f"{name}.png") for name, figure in analysis_plots.all_of(facts, analysis.maps)
        ]
    return [folder / "analysis.json", folder / "analysis.md", *drawn]


def _scores(traced: Trace) -> Tensor:
    """``(tiles, P)`` shares of the scores that the selection uses."""
    shares = [tile.attention for tile in traced.tiles]
    if any(share is None for share in shares):
        raise ValueError("this model gives no attention scores for its patches, so there is nothing to analyze")
    return torch.stack([share.flatten() for share in shares if share is not None])


def _histogram(shares: Tensor) -> Tensor:
    """``(tiles, P)`` → share of the patches in each bin of `EDGES`."""
    times = (shares * shares.shape[-1]).flatten().clamp(float(EDGES[0]), float(EDGES[-1]) * 0.9999)
    places = torch.bucketize(times, EDGES, right=True) - 1
    return torch.bincount(places.clamp(0, len(EDGES) - 2), minlength=len(EDGES) - 1) / times.numel()


def _by_layer(tiles: list[Tensor], measured: Any) -> Any:
    return _round(torch.stack([measured(tile) for tile in tiles]).mean(dim=0))


def _round(values: Any) -> Any:
    if values is None:
        return None
    return _rounded(values.numpy()) if isinstance(values, Tensor) and values.ndim else round(float(values), _DIGITS)


def _rounded(values: np.ndarray) -> Any:
    return np.round(values.astype(float), _DIGITS).tolist()


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _stats(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"mean": float(values.mean()), "low": float(low), "median": float(median), "high": float(high)}


def _read(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements of an earlier run. An incomplete last line, left by a kill, is removed from the file.

    Raises:
        ValueError: if they are of another model, encoder or budget.
    """
    if not path.exists():
        return []
    whole = path.read_bytes()
    good = whole[: whole.rfind(b"\n") + 1]
    if good != whole:
        path.write_bytes(good)
    try:
        records = [dict(json.loads(line)) for line in good.splitlines()]
        if any(not {"name", "content"} <= record.keys() for record in records[1:]):
            raise ValueError("a line without name and content")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure again, or choose another --out") from error
    if not records:
        return []
    if records[0] != head:
        other = [key for key in head if records[0].get(key) != head[key]]
        raise ValueError(
            f"{path} was measured with another {', '.join(other)}; choose another --out, or delete it to measure again"
        )
    return records[1:]


def _bar(found: image_files.ImageFiles, progress: bool) -> Iterator[tuple[str, Any]]:
    from tqdm import tqdm

    yield from tqdm(found.images(), total=len(found.names), unit="image", disable=not progress)
