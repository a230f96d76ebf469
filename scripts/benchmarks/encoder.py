"""What compression costs the encoder: beside the plain encoder to its last layer, and beside asking for all attention maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from scripts.benchmarks.flops import encoder_flops
from scripts.benchmarks.measure import Timing, alternate, peak_flops, table
from scripts.benchmarks.presets import on_device
from visionzip import ZipConfig
from visionzip.compress import compress
from visionzip.encoders import encoder_for
from visionzip.encoders.base import attention_received, split_heads
from visionzip.selectors import SELECTORS, Features

ENCODERS: dict[str, tuple[Any, dict[str, int]]] = {
    "clip-l-336": (CLIPVisionModel, {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                                     "num_attention_heads": 16, "image_size": 336, "patch_size": 14}),
    "siglip-so400m-384": (SiglipVisionModel, {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                                              "num_attention_heads": 16, "image_size": 384, "patch_size": 14}),
    "tiny": (CLIPVisionModel, {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                               "num_attention_heads": 4, "image_size": 64, "patch_size": 8}),
    "tiny-siglip": (SiglipVisionModel, {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                                        "num_attention_heads": 4, "image_size": 80, "patch_size": 8}),
}  # fmt: skip
CONFIGS = {CLIPVisionModel: CLIPVisionConfig, SiglipVisionModel: SiglipVisionConfig}
BUDGET = ZipConfig(dominant=54, contextual=10)
LAYER = -2


def build(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """An encoder of the named geometry, random weights."""
    kind, sizes = ENCODERS[name]
    torch.manual_seed(0)
    with on_device(device, dtype):
        return kind(CONFIGS[kind](**sizes)).eval()


@contextmanager
def eager(tower: Any) -> Iterator[None]:
    """Inside, attention is two products and a softmax, which is what makes maps that can be asked for."""
    before = tower.config._attn_implementation
    tower.config._attn_implementation = "eager"
    try:
        yield
    finally:
        tower.config._attn_implementation = before


@torch.no_grad()
def all_maps(tower: Any, pixels: torch.Tensor, dominant: int = 54, contextual: int = 10) -> torch.Tensor:
    """The authors' way (their `CLIPVisionTower_VisionZip`): eager attention to the last layer, ``output_attentions`` and
    ``output_hidden_states``, so that every layer's map is kept; one layer's keys on the way; then one row of one map."""
    block, taken = tower.encoder.layers[LAYER], []
    handle = block.self_attn.k_proj.register_forward_hook(lambda module, args, out: taken.append(out))
    try:
        with eager(tower):
            out = tower(pixels, output_attentions=True, output_hidden_states=True)
    finally:
        handle.remove()
    scores = out.attentions[LAYER].sum(dim=1)[:, 0].float()
    keys = split_heads(taken[0], block.self_attn.num_heads)
    features = Features(out.hidden_states[LAYER], keys.mean(dim=1), scores, has_cls=True)
    return compress(features, dominant, contextual).tokens


@torch.no_grad()
def ours(tower: Any, pixels: torch.Tensor, selector: str = "visionzip") -> torch.Tensor:
    """Up to the layer that is read, one row of attention, then selection and merging."""
    features = encoder_for(tower).encode(tower, pixels, LAYER, scores=SELECTORS[selector].needs_scores)
    budget = BUDGET.resolve(features.hidden_states.shape[1], reserved=features.cls)
    return compress(features, *budget, selector=selector).tokens


def run(
    name: str, batch: int, rounds: int, device: torch.device, dtype: torch.dtype, selectors: bool = False
) -> dict[str, Any]:
    tower = build(name, device, dtype)
    side = tower.config.image_size
    torch.manual_seed(1)
    pixels = torch.randn(batch, 3, side, side, device=device, dtype=dtype)
    plain = torch.no_grad()(lambda: tower(pixels))
    variants: dict[str, Callable[[], Any]] = {"plain": plain, "ours": lambda: ours(tower, pixels)}
    if encoder_for(tower).has_cls:
        variants["all_maps"] = lambda: all_maps(tower, pixels)
        assert dtype != torch.float32 or torch.allclose(all_maps(tower, pixels), ours(tower, pixels), atol=1e-3), (
            "different tokens"
        )
    timings = alternate(variants, rounds, device)
    peak, source = peak_flops(device, dtype)
    products = batch * encoder_flops(tower) / peak
    result: dict[str, Any] = {
        "encoder": name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "rounds": rounds,
        "seconds": {key: timing.median for key, timing in timings.items()},
        "cpu_seconds": {key: timing.cpu_median for key, timing in timings.items()},
        "seconds_all": {key: timing.seconds for key, timing in timings.items()},
        "peak_bytes": {key: timing.peak_bytes for key, timing in timings.items()},
        "ours_over_plain": timings["ours"].median / timings["plain"].median,
        "ours_over_plain_cpu": timings["ours"].cpu_median / timings["plain"].cpu_median,
        "peak_flops": peak, "peak_source": source, "product_seconds": products,
    }  # fmt: skip
    if "all_maps" in timings:
        maps, mine = timings["all_maps"], timings["ours"]
        result["all_maps_over_ours"] = maps.median / mine.median
        result["all_maps_over_ours_cpu"] = maps.cpu_median / mine.cpu_median
        busy = maps.median if device.type == "cuda" else maps.cpu_median / torch.get_num_threads()
        result["all_maps_over_products"] = busy / products
    parts = shares(tower, pixels, rounds, device, selectors)
    result["share_of_encoder"] = {key: part.median / timings["plain"].median for key, part in parts.items()}
    result["share_of_encoder_cpu"] = {key: part.cpu_median / timings["plain"].cpu_median for key, part in parts.items()}
    result["part_peak_bytes"] = {key: part.peak_bytes for key, part in parts.items()}
    result["map_bytes"] = (
        batch * tower.config.num_attention_heads * encoder_for(tower).tokens(tower) ** 2 * dtype.itemsize
    )
    return result


def shares(tower: Any, pixels: torch.Tensor, rounds: int, device: torch.device, selectors: bool) -> dict[str, Timing]:
    """Single parts by themselves: the scores, and selection + merging by each selector."""
    encoder = encoder_for(tower)
    features = encoder.encode(tower, pixels, LAYER)
    parts: dict[str, Callable[[], Any]] = {}
    if not encoder.has_cls:
        attention = tower.encoder.layers[LAYER].self_attn
        queries = split_heads(attention.q_proj(features.hidden_states), attention.num_heads)
        keys = split_heads(attention.k_proj(features.hidden_states), attention.num_heads)
        parts["attention received"] = torch.no_grad()(lambda: attention_received(queries, keys, attention.scale))
    budget = BUDGET.resolve(features.hidden_states.shape[1], reserved=features.cls)
    for selector in SELECTORS.names() if selectors else ["visionzip"]:
        parts[selector] = torch.no_grad()(lambda selector=selector: compress(features, *budget, selector=selector))
    return alternate(parts, rounds, device)


def show(result: dict[str, Any]) -> str:
    names = {"plain": "plain, SDPA, to the last layer", "ours": "encoder + compression",
             "all_maps": "all attention maps, eager, + compression"}  # fmt: skip
    base = result["seconds"]["plain"]
    rows = [
        [names[key], f"{1000 * seconds:.1f}", f"{seconds / base:.3f}",
         f"{result['cpu_seconds'][key] / result['cpu_seconds']['plain']:.3f}", f"{result['batch'] / seconds:.2f}",
         f"{result['peak_bytes'][key] / 2**20:.0f}"]
        for key, seconds in result["seconds"].items()
    ]  # fmt: skip
    title = f"{result['encoder']}, {result['batch']} images, {result['dtype']}, median of {result['rounds']}"
    parts = [
        [name, f"{100 * share:.2f} %", f"{100 * result['share_of_encoder_cpu'][name]:.2f} %",
         f"{result['part_peak_bytes'][name] / 2**20:.0f}"]
        for name, share in result["share_of_encoder"].items()
    ]  # fmt: skip
    texts = [
        title,
        table(["variant", "ms", "of plain", "of plain, CPU time", "images/s", "peak MB"], rows),
        table(["part", "of the encoder's time", "CPU time", "peak MB"], parts),
        f"A map of one layer, all heads: {result['map_bytes'] / 2**20:.0f} MB. Matrix products up to the layer that is read, at this "
        f"machine's {result['peak_flops'] / 1e12:.3g} TFLOP/s ({result['peak_source']}): {1000 * result['product_seconds']:.1f} ms.",
    ]
    if "all_maps_over_ours" in result:
        texts.append(
            f"All maps take {result['all_maps_over_ours']:.2f} times as long as ours, {result['all_maps_over_ours_cpu']:.2f} times its "
            f"CPU time. Those products alone, which nothing exact can leave out, they take {result['all_maps_over_products']:.2f} times."
        )
    return "\n\n".join(texts)
