"""The page, made with Gradio. Needs the extra ``viz``; nothing is fetched from outside."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from visionzip.analysis import draw
from visionzip.analysis.trace import Tile
from visionzip.analysis.visualize import describe_tile
from visionzip.app.looker import Look, Looker, patch_at
from visionzip.app.server import gradio
from visionzip.budgets import is_trained, split_total
from visionzip.images import ImageError, decode_image
from visionzip.merges import MERGES
from visionzip.selectors import SELECTORS

SIDE = 420
QUESTION = "What is in the image?"


def build(looker: Looker, title: str, image: str | None = None) -> Any:
    """The page as ``gr.Blocks``, not yet served. `image`: shown at the start."""
    gr = gradio()
    with gr.Blocks(
        title=f"VisionZip: {title}", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        gr.Markdown(f"# What a model keeps of an image\n`{title}`")
        parts = {"look": gr.State()}
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                parts |= add_controls(gr, looker, image)
            with gr.Column(scale=3):
                with gr.Row():
                    parts["heat"] = _image(gr, "Attention (yellow: most)", "heat")
                    parts["kept"] = _image(gr, "Kept as they are", "kept")
                    parts["merged"] = _image(gr, "Merged (disc: target)", "merged")
                parts["words"] = gr.Markdown(elem_id="words")
        with gr.Row():
            parts["seen"] = _image(gr, "What the encoder saw: click a patch", "look")
            parts["attends"] = _image(gr, "What this patch attends to", "attends")
            parts["attended"] = _image(gr, "What attends to this patch", "attended")
        parts["patch"] = gr.Markdown("Click a patch of the image on the left.", elem_id="patch")
        parts |= add_question(gr)
        connect(gr, Handlers(gr, looker), page, parts, open_at_once=image is not None)
    return page


def add_controls(gr: Any, looker: Looker, image: str | None) -> dict[str, Any]:
    """The upload, the choice of a tile, and the budget."""
    first, (kept, merged, total) = looker.blank()
    upload = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=240,
                      value=decode_image(image) if image else None, elem_id="image", format="png", buttons=[])  # fmt: skip
    # Gradio would decode it first, whatever its size, and show a stack trace on failure; `decode_image` gives a reason.
    upload.preprocess = lambda payload: payload.path if payload else None
    tile = gr.Dropdown(label="Tile", choices=[("1 of 1", 0)], value=0, visible=False, elem_id="tile")
    dominant = gr.Slider(1 + first.cls, total, kept, step=1, label="Kept as they are", info="tokens, CLS included",
                         elem_id="dominant")  # fmt: skip
    contextual = gr.Slider(0, total - 1 - first.cls, merged, step=1, label="Merged",
                           info="tokens that the rest is merged into", elem_id="contextual")  # fmt: skip
    sizes = looker.trained_budgets()
    trained = gr.Radio([f"{sum(size)}" for size in sizes], label="Trained budgets", info="visual tokens", visible=bool(sizes),
                       value=str(kept + merged) if (kept, merged) in sizes else None, elem_id="trained")  # fmt: skip
    with gr.Row():
        selectors = [name for name, entry in SELECTORS if not entry.scales]  # a scaled image has to be encoded again
        selector = gr.Dropdown(selectors, value=looker.config.selector, label="Selector", min_width=120)
        merge = gr.Dropdown(MERGES.names(), value=looker.config.merge, label="Merge", min_width=120)
    return {"upload": upload, "tile": tile, "trained": trained, "dominant": dominant, "contextual": contextual,
            "selector": selector, "merge": merge}  # fmt: skip


def add_question(gr: Any) -> dict[str, Any]:
    """A question, and the answers with all tokens and with few."""
    gr.Markdown("## Ask")
    with gr.Row():
        question = gr.Textbox(QUESTION, label="Question", scale=3, elem_id="question", max_length=2000)
        length = gr.Slider(1, 256, 32, step=1, label="Longest answer, tokens", scale=1, elem_id="length")
    button = gr.Button("Ask with all tokens and with few", variant="primary", elem_id="ask")
    with gr.Row():
        full = gr.Textbox(label="All tokens", lines=3, elem_id="full", elem_classes="answer")
        few = gr.Textbox(label="Compressed", lines=3, elem_id="few", elem_classes="answer")
    times = gr.Dataframe(
        headers=["", "visual tokens", "prompt tokens", "first token, ms", "each further, ms", "answer tokens", "in all, ms"],
        interactive=False, elem_id="times", show_label=False, buttons=[],
    )  # fmt: skip
    return {"question": question, "length": length, "button": button, "full": full, "few": few, "times": times}


def connect(gr: Any, handlers: Handlers, page: Any, parts: dict[str, Any], open_at_once: bool) -> None:
    """Connect events with handlers. `parts`: name → component, from all functions above."""

    def named(*names: str) -> list[Any]:
        return [parts[name] for name in names]

    budget = named("dominant", "contextual", "selector", "merge")
    drawings = named("heat", "kept", "merged", "words")
    patch_views = named("seen", "attends", "attended", "patch")
    everything = [*named("look", "tile", "dominant", "contextual"), *drawings, *patch_views]
    opening = named("upload", "selector", "merge")
    shown = [*named("look", "tile"), *budget]
    parts["upload"].change(handlers.open, opening, everything, api_name="open")
    if open_at_once:
        page.load(handlers.open, opening, everything, api_name=False)
    parts["tile"].input(handlers.choose_tile, shown, [*drawings, *patch_views], api_name=False)
    for control in budget:
        control.input(handlers.show_budget, shown, drawings, trigger_mode="always_last", show_progress="hidden",
                      concurrency_limit=4, api_name="budget" if control is parts["dominant"] else False)  # fmt: skip
    parts["trained"].input(handlers.choose_trained, [*named("trained"), *shown], [*named("dominant", "contextual"), *drawings],
                           show_progress="hidden", api_name=False)  # fmt: skip
    parts["seen"].select(handlers.click, shown, patch_views, api_name=False)
    asking = [*named("look", "tile", "question", "length"), *budget]
    events = [parts["button"].click, parts["question"].submit]
    gr.on(events, handlers.ask, asking, named("full", "few", "times"), api_name="ask")


class Handlers:
    """Event handlers of the page: values of components → values of others, in the order given in `connect`."""

    def __init__(self, gr: Any, looker: Looker) -> None:
        self.gr, self.looker = gr, looker
        # Gradio passes the click to a parameter with this annotation; it can't be imported at the top.
        Handlers.click.__annotations__["event"] = gr.SelectData

    def show_budget(
        self, look: Look | None, number: int, dominant: float, contextual: float, selector: str, merge: str
    ) -> list[Any]:
        """Heat map, kept patches, merged patches and the line below, for a budget; called whenever a slider moves."""
        if look is None:
            return [None, None, None, ""]
        tile = look.shown = budgeted(self.looker, look, number, dominant, contextual, selector, merge)
        heat = draw.draw_heat(tile, SIDE) if tile.attention is not None else None
        tokens = (len(tile.kept) + len(tile.targets)) * len(look.trace.tiles)
        words = f"**{tokens} of {look.trace.of_tokens} visual tokens.** {describe_tile(tile)}."
        config = self.looker.config
        if config.budgets is not None and not is_trained(config, (len(tile.kept), len(tile.targets))):
            words += " The projector was not trained for this budget."
        return [heat, draw.draw_kept(tile, SIDE), draw.draw_merged(tile, SIDE), words]

    def choose_trained(
        self,
        total: str,
        look: Look | None,
        number: int,
        _dominant: float,
        _contextual: float,
        selector: str,
        merge: str,
    ) -> list[Any]:
        """Set the sliders to a trained budget and redraw."""
        kept, merged = split_total(int(total), self.looker.config)
        return [kept, merged, *self.show_budget(look, number, kept, merged, selector, merge)]

    def open(self, path: str | None, selector: str, merge: str) -> list[Any]:
        """Read a new image: run the encoder, set the limits of the sliders, draw."""
        if not path:
            return [None, *[self.gr.skip()] * 3, None, None, None, "", None, None, None, ""]
        try:
            look = self.looker.look(path)
        except ImageError as error:  # without the name, which is that of the server's copy
            raise self.gr.Error(f"This image can't be used: {error.words}") from error
        tile = look.trace.tiles[0]
        dominant, contextual, total = self.looker.budget(tile)
        image = draw.enlarge_tile(tile, SIDE)
        names = [(f"{place + 1} of {len(look.trace.tiles)}", place) for place in range(len(look.trace.tiles))]
        return [
            look,
            self.gr.Dropdown(choices=names, value=0, visible=len(names) > 1),
            self.gr.Slider(maximum=total, minimum=1 + tile.cls, value=dominant),
            self.gr.Slider(maximum=total - 1 - tile.cls, value=contextual),
            *self.show_budget(look, 0, dominant, contextual, selector, merge),
            image, None, None, "",
        ]  # fmt: skip

    def choose_tile(self, look: Look | None, number: int, *budget: Any) -> list[Any]:
        """Show another tile of the same image."""
        if look is None:
            return [None, None, None, "", None, None, None, ""]
        image = draw.enlarge_tile(look.trace.tiles[number], SIDE)
        return [*self.show_budget(look, number, *budget), image, None, None, ""]

    def click(
        self, look: Look | None, number: int, dominant: float, contextual: float, selector: str, merge: str, event: Any
    ) -> list[Any]:
        """Show the attention from and to the patch under the pointer."""
        if look is None:
            return [self.gr.skip()] * 4
        tile = budgeted(self.looker, look, number, dominant, contextual, selector, merge)
        image = draw.enlarge_tile(tile, SIDE)
        patch = patch_at(tile, image.size, *event.index)
        try:
            to, by = self.looker.attention_of(look, number, patch)
        except ValueError as error:
            raise self.gr.Error(str(error)) from error
        row, column = divmod(patch, tile.grid[1])
        return [framed(tile, image, patch), framed(tile, draw.draw_overlay(tile, to, SIDE), patch),
                framed(tile, draw.draw_overlay(tile, by, SIDE), patch), about(tile, patch, row, column, to, by)]  # fmt: skip

    def ask(self, look: Look | None, number: int, question: str, length: float, *budget: Any) -> list[Any]:
        """Both answers, and a row of counts and times for each."""
        if look is None:
            raise self.gr.Error("Upload an image first.")
        try:
            tile = budgeted(self.looker, look, number, *budget)
            config = self.looker.with_budget(len(tile.kept), len(tile.targets), *budget[2:])
            pair = self.looker.answers(look, question, config, int(length))
        except ValueError as error:
            raise self.gr.Error(str(error)) from error
        rows = [
            [name, tokens, answer.prompt_tokens, f"{1000 * answer.first:.0f}", f"{answer.decode_ms:.0f}", answer.new_tokens,
             f"{1000 * answer.seconds:.0f}"]
            for name, tokens, answer in (("all tokens", pair.full_tokens, pair.full), ("compressed", pair.tokens, pair.compressed))
        ]  # fmt: skip
        return [pair.full.text, pair.compressed.text, rows]


def budgeted(
    looker: Looker, look: Look, number: int, dominant: float, contextual: float, selector: str, merge: str
) -> Tile:
    """A tile with the sliders' budget; if dominant and contextual together are too many, there are fewer contextual tokens."""
    tile = look.trace.tiles[number]
    total = tile.features.hidden_states.shape[1]
    kept = min(max(int(dominant), 1 + tile.cls), total)
    return tile.again(looker.with_budget(kept, min(int(contextual), total - kept), selector, merge))


def framed(tile: Tile, image: Image.Image, patch: int) -> Image.Image:
    """A drawing with one patch framed."""
    from PIL import ImageDraw

    cell = draw.cell_size(tile.grid, SIDE)
    row, column = divmod(patch, tile.grid[1])
    box = (column * cell - 1, row * cell - 1, (column + 1) * cell, (row + 1) * cell)
    image = image.copy()
    pen = ImageDraw.Draw(image)
    pen.rectangle(
        tuple(side + grow for side, grow in zip(box, (-2, -2, 2, 2), strict=True)), outline=(255, 255, 255), width=2
    )
    pen.rectangle(box, outline=draw.MARK, width=3)
    return image


def about(tile: Tile, patch: int, row: int, column: int, to: np.ndarray, by: np.ndarray) -> str:
    """The clicked patch in words."""
    fate = int(tile.groups[row, column])
    what = {-2: "kept as it is", -1: "dropped"}.get(fate, f"merged into token {fate + 1}")
    best = [divmod(int(place), tile.grid[1]) for place in (to.argmax(), by.argmax())]
    names = [f"row {r + 1}, column {c + 1}" for r, c in best]
    share = (
        ""
        if tile.attention is None
        else f", with {float(tile.attention[row, column]) * tile.patches:.1f}× the average attention"
    )
    return (
        f"**Patch {patch + 1} (row {row + 1}, column {column + 1})**, {what}{share}. "
        f"It attends most to {names[0]}; most attended to by {names[1]}."
    )


def _image(gr: Any, caption: str, name: str) -> Any:
    """A drawing below its caption: Gradio's own label would cover the first patches."""
    with gr.Column(min_width=240):
        gr.Markdown(caption)
        return gr.Image(
            label=caption, show_label=False, interactive=False, elem_id=name, format="png", buttons=["fullscreen"]
        )
