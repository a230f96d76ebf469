"""`visionzip visualize`: what is kept of images, tiles and frames, as PNGs and one HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from visionzip.analysis import draw, image_files, page, plots
from visionzip.analysis.style import save_figure, set_title, style, svg
from visionzip.analysis.trace import Tile, Trace, trace, trace_video
from visionzip.attach import attached
from visionzip.video import decode_video

SIDE = 400
"""Pixels of a drawing's longer side."""


@dataclass
class Result:
    """What was written and what was not: `page`, `images` (PNGs), `skipped` (file → reason), one `rows` entry per image."""

    page: Path
    images: list[Path] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    rows: list[tuple[str, ...]] = field(default_factory=list)


def visualize(
    model: Any,
    path: str | Path,
    out: str | Path = "visionzip-report.html",
    *,
    theme: str = "light",
    frames: int = 8,
    limit: int | None = None,
    title: str = "",
    progress: bool = True,
) -> Result:
    """Draw what the attached `model` keeps of the image, video or folder of images at `path`.

    Args:
        out: the page; PNGs go into the folder beside it that has its name without the ending. Or a folder for both.
        theme: theme of the PNGs, ``"light"`` or ``"dark"``; the page follows the reader's system.
        frames: number of frames sampled uniformly from a video.
        limit: at most this many images of a folder, in the order of their names.

    Raises:
        ValueError: if nothing is attached, there is no image, or none can be read.
    """
    attachment = attached(model)
    if attachment is None:
        raise ValueError("nothing is attached to this model, so no tokens are left out; give a budget")
    target, folder = output_paths(out)
    if image_files.is_video(path):
        name = Path(path).name
        traces: Iterable[Trace] = [trace_video(model, decode_video(path, frames), name=name)]
        found, count = image_files.ImageFiles(Path(path).parent, [name]), 1
    else:
        found = image_files.find_images(path, limit, folder)
        count = len(found.names)
        traces = (trace(model, image, name=name) for name, image in found.images())

    result = Result(target)
    sections = []
    for one in _bar(traces, count, progress):
        sections.append(_section(one, folder, theme, result, title or type(attachment.model).__name__))
    result.skipped = dict(found.skipped)
    if not sections:
        raise ValueError(f"none of the {count} file(s) at {path} is a readable image:\n{found.summary()}")
    config = attachment.config
    intro = [
        f"{type(attachment.model).__name__} {title}".strip(),
        f"selector {config.selector}, dominant {config.dominant}, contextual {config.contextual}, merge {config.merge}",
    ]
    head = ("image", "tiles or frames", "tokens", "of", "attention held by kept patches")
    parts = [page.render_table(head, result.rows), *sections]
    if found.skipped:
        parts.append(page.render_preformatted("Skipped", found.summary()))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page.render_page("What is kept", intro, parts), encoding="utf-8")
    return result


def output_paths(out: str | Path) -> tuple[Path, Path]:
    """The paths of the page and of the folder of PNGs, which is beside the page under the same name, or `out` itself if that is a
    folder."""
    target = Path(out)
    if target.suffix.lower() in (".html", ".htm"):
        return target, target.with_suffix("")
    return target / "report.html", target / "images"


def _section(one: Trace, folder: Path, theme: str, result: Result, model: str) -> str:
    """One image: its PNGs written, its part of the page returned."""
    kind = "frame" if image_files.is_video(one.name) else "tile"
    what = kind if len(one.tiles) > 1 else "image"
    rows = []
    for number, tile in enumerate(one.tiles):
        drawings = draw_views(tile)
        if len(one.tiles) > 1:
            drawings[0] = (f"{kind} {number + 1} of {len(one.tiles)}", drawings[0][1])
        stem = one.name + (f".{kind}{number + 1:02d}" if len(one.tiles) > 1 else "")
        sheet = draw.draw_panel(
            drawings,
            f"{one.name}{f', {drawings[0][0]}' if len(one.tiles) > 1 else ''}",
            f"{model}, {describe_tile(tile)}",
            theme,
        )
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"{stem}.kept.png")
        result.images.append(folder / f"{stem}.kept.png")
        rows.append([page.render_figure(caption, image) for caption, image in drawings])
    if one.held is not None:
        with style(theme):
            figure = plots.histogram(one.tiles, what)
            set_title(
                figure,
                "How the attention is spread",
                f"{one.name}, {model}, {one.tokens} of {one.of_tokens} visual tokens",
            )
            result.images.append(save_figure(figure, folder / f"{one.name}.attention.png"))
        with style("page"):
            drawn = [page.render_drawing("how the attention is spread", svg(plots.histogram(one.tiles, what)))]
            if len(one.tiles) == 1:
                drawn.append(
                    page.render_drawing("attention covered by a budget", svg(plots.budget_curve(one.tiles[0])))
                )
            rows.append(drawn)
    held = f"{one.held:.0%}" if one.held is not None else "no scores"
    result.rows.append((one.name, str(len(one.tiles)), str(one.tokens), str(one.of_tokens), held))
    return page.render_section(
        one.name, [f"{one.tokens} of {one.of_tokens} visual tokens", describe_tile(one.tiles[0])], rows
    )


def draw_views(tile: Tile, side: int = SIDE) -> list[tuple[str, Image.Image]]:
    """The drawings of one tile with their captions; without scores there is no heat map."""
    found = [("what the encoder saw", draw.enlarge_tile(tile, side))]
    if tile.attention is not None:
        most = float(tile.attention.max()) * tile.patches
        found.append((f"attention (yellow: {most:.1f}× average)", draw.draw_heat(tile, side)))
    found.append((f"kept: {int(tile.kept_mask.sum())} of {tile.patches} patches", draw.draw_kept(tile, side)))
    if len(tile.targets):
        found.append((f"merged into {len(tile.targets)} tokens (disc: target)", draw.draw_merged(tile, side)))
    return found


def describe_tile(tile: Tile) -> str:
    """The budget of one tile in words."""
    cls = " and CLS" if tile.cls else ""
    tokens = len(tile.kept) + len(tile.targets)
    held = "" if tile.held is None else f"; the kept patches receive {tile.held:.0%} of the attention"
    return f"{tokens} tokens: {int(tile.kept_mask.sum())} patches{cls} as they are, {len(tile.targets)} merged{held}"


def _bar(items: Iterable[Trace], count: int, progress: bool) -> Iterable[Trace]:
    from tqdm import tqdm

    return tqdm(items, total=count, unit="image", disable=not progress)
