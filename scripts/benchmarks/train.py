"""A whole training step (encoder, projector, frozen LLM, loss, backward, optimizer), the plain way and the fast way.

The plain way is what the published recipe does: attention maps of every layer of an eager encoder, right-padded batches in random
order with a mask, logits everywhere, activations checkpointed. Both ways train on the same samples with the same budget, and their
losses and gradients are compared before anything is timed. `full` is the recipe without compression.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data.batching import padded, share
from scripts.benchmarks import measure
from scripts.benchmarks.encoder import LAYER, all_maps
from scripts.benchmarks.flops import Work, step_flops
from scripts.benchmarks.presets import IGNORE, PRESETS, SYSTEM_TOKENS, Conversation, Preset, build, conversations
from train.compiled import compile_parts, uncompile_parts
from train.labels import count_supervised
from train.layout import Layout, PackedRow, PaddedRows
from train.loss import summed_loss
from train.prefix import Prefix, common_beginning
from visionzip.compress import compress
from visionzip.encoders import encoder_for

POOL = 16  # different images; a step's samples take theirs from it


@dataclass(frozen=True)
class Way:
    """What one variant does."""

    encoder: str = "ours"  # ours, maps, cache, uncompressed
    sort: bool = True  # micro-batches of like lengths rather than random ones
    mask: bool = False  # hand on the attention mask
    full_logits: bool = False
    checkpointing: bool = False
    prefix: bool = True
    packed: bool = True  # samples in one row without padding
    compiled: bool = False  # norms and MLPs of the LLM through torch.compile


PLAIN = Way("maps", sort=False, mask=True, full_logits=True, checkpointing=True, prefix=False, packed=False)
WAYS = {"plain": PLAIN, "fast": Way(), "fast + cache": Way("cache")}
FULL = {"plain, all tokens": replace(PLAIN, encoder="uncompressed")}
PARTS = {
    "without the cache": Way(),
    "padded, sorted": Way("cache", packed=False),
    "padded, random, masked": Way("cache", sort=False, mask=True, packed=False),
    "full logits": Way("cache", full_logits=True, packed=False, prefix=False),
    "checkpointing": Way("cache", checkpointing=True, prefix=False, packed=False),
    "no shared prefix": Way("cache", prefix=False),
    "torch.compile": Way("cache", compiled=True),
}


class Pictures:
    """Stands in for the model's `get_image_features`: `pixel_values` are the numbers of images of a pool."""

    def __init__(self, model: Any, preset: Preset, device: torch.device) -> None:
        self.model, self.preset, self.encoder = model, preset, "ours"
        side = preset.vision["image_size"]
        torch.manual_seed(1)
        self.pixels = torch.randn(POOL, preset.tiles, 3, side, side, dtype=preset.dtype, device=device)
        with torch.no_grad():
            self.stored = torch.cat([self.compressed(self.pixels[n : n + 1]) for n in range(POOL)]).cpu()

    def compressed(self, pixels: Tensor, maps: bool = False) -> Tensor:
        """``(B, tiles, 3, side, side)`` → ``(B, kept, D)``."""
        tower, flat = self.model.model.vision_tower, pixels.flatten(0, 1)
        if maps:
            tokens = all_maps(tower, flat, self.preset.dominant, self.preset.contextual)
        else:
            features = encoder_for(tower).encode(tower, flat, LAYER)
            tokens = compress(features, self.preset.dominant, self.preset.contextual).tokens
        return tokens.reshape(len(pixels), -1, tokens.shape[-1])

    @torch.no_grad()
    def tokens(self, numbers: Tensor) -> Tensor:
        if self.encoder == "cache":
            return self.stored[numbers.cpu()].to(self.pixels.device, non_blocking=True)
        pixels = self.pixels[numbers]
        if self.encoder == "uncompressed":
            tower = self.model.model.vision_tower
            out = tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[LAYER][:, 1:]
            return out.reshape(len(pixels), -1, out.shape[-1])
        return self.compressed(pixels, maps=self.encoder == "maps")

    def __call__(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        return BaseModelOutputWithPooling(
            pooler_output=list(self.model.model.multi_modal_projector(self.tokens(pixel_values)))
        )  # type: ignore[arg-type]


class Bench:
    """One model and its samples; `step` runs one optimizer step some way."""

    def __init__(self, preset: Preset, device: torch.device) -> None:
        self.preset, self.device = preset, device
        self.model = build(preset, device)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})  # on for the ways that say so
        self.pictures = Pictures(self.model, preset, device)
        self.model.model.__dict__["get_image_features"] = self.pictures
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0)  # weights stay: every step does the same work
        count = preset.batch * preset.accumulation
        self.samples = {visual: conversations(preset, count, visual) for visual in {preset.kept, preset.full}}
        rows = ((sample.input_ids, sample.labels) for sample in self.samples[preset.kept])
        beginning = common_beginning(rows, self.model.config.image_token_id)
        assert len(beginning) == SYSTEM_TOKENS
        self.prefix = Prefix(self.model, "model.language_model", beginning)

    def micro_batches(self, way: Way) -> list[list[Conversation]]:
        samples = self.samples[self.preset.full if way.encoder == "uncompressed" else self.preset.kept]
        lengths = [len(sample.input_ids) for sample in samples]
        if way.sort:
            groups = share(lengths, 1, self.preset.accumulation, way.packed)[0]
        else:
            order = random.Random(0).sample(range(len(samples)), len(samples))
            groups = [order[start : start + self.preset.batch] for start in range(0, len(order), self.preset.batch)]
        return [[samples[place] for place in group] for group in groups]

    def collate(self, rows: list[Conversation]) -> tuple[dict[str, Tensor], Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([row.input_ids for row in rows], batch_first=True)
        labels = pad([row.labels for row in rows], batch_first=True, padding_value=IGNORE)
        mask = pad([torch.ones_like(row.input_ids) for row in rows], batch_first=True)
        numbers = torch.tensor([row.picture % POOL for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": numbers}
        return {name: value.to(self.device) for name, value in inputs.items()}, labels.to(self.device)

    def step(self, way: Way) -> Tensor:
        """Loss of one optimizer step over all samples, per supervised token."""
        self.pictures.encoder = way.encoder
        self.model.train(way.checkpointing)  # checkpointing is off in eval mode; there is no dropout to switch on
        llm = self.model.model.language_model
        for module in llm.modules():  # the LLM has the switch as well as its layers, and a prefix asks all of them
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = way.checkpointing
        uncompile_parts(llm)
        if way.compiled:
            compile_parts(llm)
        batches = [self.collate(rows) for rows in self.micro_batches(way)]
        supervised = sum(count_supervised(labels) for _, labels in batches)
        total = torch.zeros((), device=self.device)
        for inputs, labels in batches:
            loss = self.loss(way, inputs, labels) / supervised
            loss.backward()
            total += loss.detach()
        self.gradients = [p.grad.clone() for p in self.trained if p.grad is not None]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def loss(self, way: Way, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        if way.full_logits:
            if not way.mask:
                inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
            return self.model(**inputs, use_cache=False, labels=labels).loss * count_supervised(labels)
        prefix = self.prefix if way.prefix else None
        layout: Layout = PaddedRows(prefix, way.mask)
        if way.packed:
            layout = PackedRow(self.model.model.language_model, prefix)
        return summed_loss(self.model, self.model.lm_head, inputs, labels, layout)

    def work(self, way: Way) -> Work:
        """Counted, not measured: what one step takes."""
        batches = self.micro_batches(way)
        lengths = [[len(row.input_ids) for row in rows] for rows in batches]
        samples, real = sum(map(len, batches)), sum(map(sum, lengths))
        spared = SYSTEM_TOKENS * samples if way.prefix else 0
        filled = real if way.packed else sum(padded(rows, [range(len(rows))]) for rows in lengths)
        return Work(
            samples=samples,
            real=real,
            tokens=real - spared,
            padded=filled - spared,
            supervised=sum(count_supervised(row.labels[None]) for rows in batches for row in rows),
            squares=sum(length**2 for rows in lengths for length in rows),
            pictures=0 if way.encoder == "cache" else samples * self.preset.tiles,
        )


def compare(
    bench: Bench, ways: dict[str, Way], exact: list[Tensor] | None = None, needed: bool = True
) -> dict[str, Any]:
    """Loss and gradient of every way, relative to those of the first; gradients to `exact` where that is given.

    A way that can't be run here is told and left out; the first one only where it is not `needed`.
    """
    found: dict[str, Any] = {}
    reference, gradients = None, flat(exact) if exact is not None else None
    for name, way in ways.items():
        try:
            loss = bench.step(way).item()
        except RuntimeError as error:  # too little memory, no compiler: the others are still worth measuring
            if reference is None and needed:
                raise
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
            bench.optimizer.zero_grad(set_to_none=True)
            continue
        mine = flat(bench.gradients)
        reference = loss if reference is None else reference
        gradients = mine if gradients is None else gradients
        difference = ((mine - gradients).norm() / gradients.norm()).item()
        found[name] = {
            "loss": loss,
            "loss_difference": abs(loss - reference) / abs(reference),
            "gradient_difference": difference,
        }
    return found


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().float() for gradient in gradients])


def run(
    name: str,
    rounds: int,
    device: torch.device,
    parts: bool = False,
    uncompressed: bool = True,
    until: float | None = None,
) -> dict[str, Any]:
    """`until`: see `measure.alternate`."""
    preset = PRESETS[name]
    bench = Bench(preset, device)
    ways = {
        **WAYS,
        **({f"fast + cache, {key}": way for key, way in PARTS.items() if key != "without the cache"} if parts else {}),
    }
    equal = compare(bench, ways)  # also the untimed first round
    whole = (
        compare(bench, FULL, needed=False) if uncompressed else {}
    )  # another model: its loss is compared with nothing
    everything = {key: way for key, way in {**ways, **FULL}.items() if key in equal or key in whole}
    runs: dict[str, Callable[[], Any]] = {key: (lambda way=way: bench.step(way)) for key, way in everything.items()}
    timings = measure.alternate(runs, rounds, device, warmup=0, until=until)
    peak, source = measure.peak_flops(device, preset.dtype)
    result: dict[str, Any] = {"preset": name, "rounds": rounds, "peak_flops": peak, "peak_source": source, "ways": {}}
    for key, way in everything.items():
        work, seconds = bench.work(way), timings[key].median
        flops = step_flops(bench.model, preset, work)
        result["ways"][key] = {
            "seconds": seconds, "seconds_all": timings[key].seconds, "cpu_seconds": timings[key].cpu_median,
            "samples_per_second": work.samples / seconds, "tokens_per_second": work.tokens / seconds,
            "peak_bytes": timings[key].peak_bytes, "flops": flops, "model_flop_utilisation": flops / seconds / peak,
            "bound_samples_per_second": peak / flops * work.samples, "work": work.__dict__, **equal.get(key, {}),
        }  # fmt: skip
    for key in ("plain", "plain, all tokens"):
        if key in result["ways"]:
            base = result["ways"][key]
            for entry in result["ways"].values():
                entry[f"faster_than_{key}"] = base["seconds"] / entry["seconds"]
                entry[f"faster_than_{key}_cpu"] = base["cpu_seconds"] / max(entry["cpu_seconds"], 1e-9)
    return result


def show(result: dict[str, Any]) -> str:
    rows = []
    for name, way in result["ways"].items():
        work = way["work"]
        rows.append([
            name, f"{way['seconds']:.2f}", f"{way['samples_per_second']:.2f}", f"{way['tokens_per_second']:.0f}",
            f"{way['faster_than_plain']:.2f}x", f"{way['faster_than_plain_cpu']:.2f}x", f"{way['peak_bytes'] / 2**30:.2f}",
            f"{100 * way['model_flop_utilisation']:.0f} %", f"{way['bound_samples_per_second']:.1f}",
            f"{100 * (work['padded'] / work['tokens'] - 1):.0f} %",
            f"{way.get('gradient_difference', float('nan')):.1e}",
        ])  # fmt: skip
    headers = [
        "variant",
        "s per step",
        "samples/s",
        "tokens/s",
        "of plain",
        "CPU time",
        "peak GiB",
        "MFU",
        "bound samples/s",
        "padding",
        "gradient off by",
    ]
    title = f"{result['preset']}: one optimizer step, median of {result['rounds']}; peak {result['peak_flops'] / 1e12:.2f} TFLOP/s ({result['peak_source']})"
    return f"{title}\n\n{measure.table(headers, rows)}"
