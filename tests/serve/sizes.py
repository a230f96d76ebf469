"""Tiny models whose LLM has heads that vLLM's attention on a CPU takes."""

from __future__ import annotations

from typing import Any

from tests.families.case import Case

#: of the tiny LLMs: 2 heads of 32, the smallest that vLLM's attention on a CPU takes
HEADS = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
}


def tiny_model(case: Case) -> Any:
    """The case's random model, with heads of 32 in its LLM."""
    stock = case.config

    def config() -> Any:
        found = stock()
        for name, value in HEADS.items():
            setattr(found.text_config, name, value)
        if getattr(found.vision_config, "out_hidden_size", None):
            found.vision_config.out_hidden_size = HEADS["hidden_size"]
        return found

    case.config = config  # type: ignore[method-assign]
    try:
        return case.model()
    finally:
        del case.config
