"""Prefill: what a model does before its first token, with all visual tokens and with the kept ones."""

from __future__ import annotations

from typing import Any

import torch

from scripts.benchmarks import measure
from scripts.benchmarks.presets import PRESETS, SYSTEM_TOKENS, build
from scripts.benchmarks.train import Pictures

QUESTION = 24  # tokens behind the image


def run(name: str, rounds: int, device: torch.device, batch: int = 1) -> dict[str, Any]:
    """LLM prefill alone, as the paper's table has it, and with the encoder in front. The KV cache is filled."""
    preset = PRESETS[name]
    model = build(preset, device)
    pictures = Pictures(model, preset, device)
    numbers = torch.arange(batch, device=device)

    def llm(visual: int) -> Any:
        embeddings = torch.randn(
            batch, SYSTEM_TOKENS + visual + QUESTION, preset.text["hidden_size"], device=device, dtype=preset.dtype
        )

        @torch.no_grad()
        def prefill() -> Any:
            out = model.model.language_model(inputs_embeds=embeddings, use_cache=True)
            return model.lm_head(out.last_hidden_state[:, -1:])

        return prefill

    @torch.no_grad()
    def encode(encoder: str) -> Any:
        pictures.encoder = encoder
        return model.model.multi_modal_projector(pictures.tokens(numbers))

    full, kept = llm(preset.full), llm(preset.kept)
    timings = measure.alternate(
        {
            "full": full,
            "compressed": kept,
            "full, with encoder": lambda: (encode("uncompressed"), full()),
            "compressed, with encoder": lambda: (encode("ours"), kept()),
        },
        rounds,
        device,
    )
    cache = 2 * preset.text["num_hidden_layers"] * preset.text["hidden_size"] * preset.dtype.itemsize
    result: dict[str, Any] = {"preset": name, "batch": batch, "rounds": rounds, "ways": {}}
    for key, timing in timings.items():
        visual = preset.full if key.startswith("full") else preset.kept
        result["ways"][key] = {
            "visual_tokens": visual, "seconds": timing.median, "seconds_all": timing.seconds, "cpu_seconds": timing.cpu_median,
            "peak_bytes": timing.peak_bytes, "kv_cache_bytes": batch * cache * (SYSTEM_TOKENS + visual + QUESTION),
        }  # fmt: skip
    result["faster"] = timings["full"].median / timings["compressed"].median
    result["faster_with_encoder"] = timings["full, with encoder"].median / timings["compressed, with encoder"].median
    return result


def show(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            way["visual_tokens"],
            f"{1000 * way['seconds']:.1f}",
            f"{way['kv_cache_bytes'] / 2**20:.0f}",
            f"{way['peak_bytes'] / 2**20:.0f}",
        ]
        for name, way in result["ways"].items()
    ]
    title = (
        f"{result['preset']}, {result['batch']} prompt{'s' if result['batch'] > 1 else ''}: prefill {result['faster']:.1f}x as fast, "
        f"{result['faster_with_encoder']:.1f}x with the encoder; median of {result['rounds']}"
    )
    return f"{title}\n\n{measure.table(['way', 'visual tokens', 'ms', 'KV cache MB', 'peak MB'], rows)}"
