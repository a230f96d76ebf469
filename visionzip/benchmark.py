"""`visionzip benchmark`: what a model costs with all visual tokens and with few, measured turn by turn of a conversation.

Timed is what ``generate`` does, whole: time to the first token holds the encoder, the projector and the prefill of the LLM, which
hooks on the LLM tell apart. Nothing here knows a family.
"""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visionzip.analysis.ask import Stopwatch
from visionzip.attach import attach, attached, detach, unwrap
from visionzip.budgets import ALL, format_budget
from visionzip.config import ZipConfig
from visionzip.families import family_for
from visionzip.inputs import batch_prompts, prompt_inputs, to_model
from visionzip.intercept import Interceptions
from visionzip.prompts import question, usual_template

QUESTIONS = ("Describe the picture.", "What else is there?", "And what colour is it?")


@dataclass(frozen=True)
class Row:
    """One turn under one budget and batch size; medians over the repeats. Times in seconds, sizes in bytes.

    Attributes:
        budget: ``"all"``, or ``"54 + 10"`` (dominant + contextual).
        visual_tokens: of one image, in the prompt.
        prompt_tokens: of one row, all turns so far.
        encode: images to embeddings; 0 in later turns, which reuse the cache.
        prefill: the LLM on the new part of the prompt.
        first: time to the first token.
        decode: each further token, for the whole batch.
        peak: highest memory in use, weights included; None where it can't be known.
        cache: keys and values at the end of the turn.
        flops: of the first forward (encoder, projector, prefill); None in later turns.
        encode_flops: the part of it before the LLM.
    """

    budget: str
    batch: int
    turn: int
    visual_tokens: int
    prompt_tokens: int
    encode: float
    prefill: float
    first: float
    decode: float
    peak: int | None
    cache: int
    flops: int | None
    encode_flops: int | None


def benchmark(
    model: Any,
    processor: Any,
    image: Image.Image,
    *,
    budgets: Sequence[ZipConfig | None],
    batches: Sequence[int] = (1,),
    turns: int = 1,
    new_tokens: int = 32,
    repeats: int = 3,
    report: Callable[[str], None] = lambda doing: None,
) -> list[Row]:
    """Every budget (None: the untouched model) × batch size, `turns` of a conversation each.

    Raises:
        ValueError: for numbers below 1, or a budget that can't be met.
    """
    for name, value in (
        ("batch", min(batches)),
        ("turns", turns),
        ("new tokens", new_tokens - 1),
        ("repeats", repeats),
    ):
        if value < 1:
            raise ValueError(
                f"{name} must be at least {2 if name == 'new tokens' else 1}, got {value + (name == 'new tokens')}"
            )
    before = attached(model)
    cases = [_Case(format_budget(budget), budget, batch) for budget in budgets for batch in batches]
    try:
        for repeat in range(
            repeats + 1
        ):  # all in turn, so that what else the machine does falls on all; the first warms up
            for case in cases:
                report(f"{case.name}, batch {case.batch}" + (f", {repeat} of {repeats}" if repeat else ", warming up"))
                _put(model, processor, case.budget)
                if not repeat:
                    case.prepare(model, processor, image)
                found = list(time_turns(model, processor, case.inputs, turns, new_tokens))
                case.runs += [found] if repeat else []
    finally:
        if before is not None:
            attach(model, before.processor, before.config)
    return [case.row(turn) for case in cases for turn in range(turns)]


def _put(model: Any, processor: Any, budget: ZipConfig | None) -> None:
    if budget is None:
        detach(model)
    else:
        attach(model, processor, budget)


@dataclass
class _Case:
    """One budget and batch size: its inputs, what was counted of it, what was timed."""

    name: str
    budget: ZipConfig | None
    batch: int
    inputs: dict[str, Any] = field(default_factory=dict)
    visual: int = 0
    flops: tuple[int, int] = (0, 0)
    runs: list[list[dict[str, Any]]] = field(default_factory=list)

    def prepare(self, model: Any, processor: Any, image: Image.Image) -> None:
        row = prompt_inputs(usual_template(processor), [question(QUESTIONS[0])], [image])
        inputs = batch_prompts(processor, [row] * self.batch)
        self.inputs = to_model(model, inputs)
        token = unwrap(
            model
        ).config.image_token_id  # of the model: Gemma 3's processor calls the token before an image so
        self.visual = int((inputs["input_ids"][0] == token).sum())
        self.flops = count_flops(model, self.inputs)

    def row(self, turn: int) -> Row:
        seen = [run[turn] for run in self.runs]
        middle = {key: statistics.median(one[key] for one in seen) for key in ("encode", "prefill", "first", "decode")}
        peaks = [one["peak"] for one in seen if one["peak"] is not None]
        flops, encode_flops = self.flops if turn == 0 else (None, None)
        return Row(self.name, self.batch, turn + 1, self.visual, seen[0]["prompt"], peak=max(peaks, default=None),
                   cache=seen[0]["cache"], flops=flops, encode_flops=encode_flops, **middle)  # fmt: skip


def time_turns(
    model: Any, processor: Any, inputs: dict[str, Any], turns: int, new_tokens: int
) -> Iterator[dict[str, Any]]:
    """One conversation. Later turns pass no pixels: the image is in the cache already."""
    tokenizer = getattr(processor, "tokenizer", processor)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    given, cache = dict(inputs), None
    for turn in range(turns):
        watch = Stopwatch(model.device)
        with torch.no_grad(), _peak(model.device) as peak, _llm_times(model, watch) as times:
            watch.start = watch.now()
            output = model.generate(
                **given, past_key_values=cache, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
                pad_token_id=pad, streamer=watch, return_dict_in_generate=True, use_cache=True,
            )  # fmt: skip
        cache = output.past_key_values
        yield {
            "prompt": given["input_ids"].shape[1],
            "encode": (times[0] - watch.start) if turn == 0 else 0.0,
            "prefill": times[1] - times[0],
            "first": watch.first,
            "decode": (watch.all - watch.first) / (new_tokens - 1),
            "peak": peak[0] if peak else None,
            "cache": cache_bytes(cache),
        }
        more = f" USER: {QUESTIONS[(turn + 1) % len(QUESTIONS)]} ASSISTANT:"
        ids = tokenizer(more, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        ids = torch.cat((output.sequences, ids.expand(len(output.sequences), -1)), dim=1)
        mask = torch.nn.functional.pad(
            given["attention_mask"], (0, ids.shape[1] - given["input_ids"].shape[1]), value=1
        )
        given = {"input_ids": ids, "attention_mask": mask}


@contextmanager
def _llm_times(model: Any, watch: Stopwatch) -> Iterator[list[float]]:
    """When the LLM's first forward began and ended."""
    times: list[float] = []
    llm = unwrap(model).get_submodule(family_for(unwrap(model)).llm)

    def note(*_: Any, **__: Any) -> None:
        if len(times) < 2:
            times.append(watch.now())

    with Interceptions() as put:
        put.before_forward(llm, note)
        put.after_forward(llm, note)
        yield times


def count_flops(model: Any, inputs: dict[str, Any]) -> tuple[int, int]:
    """Multiplications and additions of one forward, and of its part before the LLM. Attention is counted, so it is run plainly."""
    counter = FlopCounterMode(display=False)
    before: list[int] = []
    llm = unwrap(model).get_submodule(family_for(unwrap(model)).llm)
    with Interceptions() as put, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        put.before_forward(llm, lambda *_: before.append(counter.get_total_flops()))
        model(**inputs, logits_to_keep=1, use_cache=False)
    return counter.get_total_flops(), before[0]


def cache_bytes(cache: Any) -> int:
    """Size of keys and values in a transformers cache."""
    tensors: list[Tensor] = []
    for layer in getattr(cache, "layers", None) or []:
        tensors += [
            found for found in (getattr(layer, "keys", None), getattr(layer, "values", None)) if torch.is_tensor(found)
        ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Highest memory in use inside: of the GPU's allocator, else the resident memory of this process (Linux)."""
    found: list[int] = []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device))
        return
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")  # the kernel forgets the highest mark so far
        known = True
    except OSError:
        known = False
    yield found
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if known else None
    if match:
        found.append(int(match[1]) * 1024)


def render_rows(rows: Sequence[Row]) -> str:
    """Markdown: one line per budget, batch size and turn; numbers in brackets say how many times smaller or faster than with all tokens."""
    head = ["budget", "batch", "turn", "visual tokens", "prompt", "encode ms", "prefill ms", "first token ms",
            "ms per token", "KV cache MB", "peak MB", "GFLOP"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    plain = {(row.batch, row.turn): row for row in rows if row.budget == ALL}
    for row in rows:
        base = plain.get((row.batch, row.turn))
        cells = [
            row.budget, str(row.batch), str(row.turn), str(row.visual_tokens), str(row.prompt_tokens),
            f"{1000 * row.encode:.1f}" if row.turn == 1 else "", _versus(1000 * row.prefill, 1000 * base.prefill if base else None),
            _versus(1000 * row.first, 1000 * base.first if base else None), f"{1000 * row.decode:.1f}",
            _versus(row.cache / 1e6, base.cache / 1e6 if base else None),
            "" if row.peak is None else f"{row.peak / 1e6:.0f}",
            "" if row.flops is None else _versus(row.flops / 1e9, base.flops / 1e9 if base and base.flops else None),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _versus(value: float, base: float | None) -> str:
    digits = 1 if value >= 10 else 2 if value >= 1 else 3
    ratio = f" ({base / value:.1f}×)" if base and value and abs(base - value) > 1e-9 else ""
    return f"{value:.{digits}f}{ratio}"


def facts(rows: Sequence[Row], model: Any, **more: Any) -> dict[str, Any]:
    """What ``--json`` writes: where it was measured, and every row."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "model": type(unwrap(model)).__name__, "device": name, "dtype": str(model.dtype).removeprefix("torch."),
        "weights_bytes": weights, "torch": torch.__version__, **more, "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def draw_rows(rows: Sequence[Row], where: str) -> Any:
    """Time to first token, prefill, cache and work against visual tokens, a line a batch size; first turns only."""
    from visionzip.analysis.style import SERIES, new_figure, set_title, whole_ticks

    first = [row for row in rows if row.turn == 1]
    figure, axes = new_figure(10, 6.8, nrows=2, ncols=2)
    panels = (
        ("Time to first token", "ms", lambda row: 1000 * row.first),
        ("Prefill of the LLM", "ms", lambda row: 1000 * row.prefill),
        ("Keys and values", "MB", lambda row: row.cache / 1e6),
        ("Work of the first forward", "GFLOP", lambda row: (row.flops or 0) / 1e9),
    )
    for panel, (title, unit, value) in zip(axes.flat, panels, strict=True):
        for place, batch in enumerate(sorted({row.batch for row in first})):
            points = sorted((row.visual_tokens, value(row)) for row in first if row.batch == batch)
            colour, marker = SERIES[place % len(SERIES)]
            panel.plot(*zip(*points, strict=True), marker=marker, color=colour, linewidth=2, label=f"batch {batch}")
        panel.set(title=title, ylabel=unit, xlabel="visual tokens per image")
        whole_ticks(panel.xaxis)
        panel.set_xlim(0, 1.07 * max(row.visual_tokens for row in first))
        panel.set_ylim(0, 1.1 * max(value(row) for row in first))
    if len({row.batch for row in first}) > 1:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=6, fontsize=10)
    set_title(figure, "Cost against visual tokens", where)
    return figure
