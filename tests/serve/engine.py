"""vLLM in the process of the tests, and what it is compared with: ``generate`` of the same directory in the same environment.

Not collected by pytest: `make test-serve` names the files that need an engine, whose environment is another than the suite's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, where a test can look at it
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm.config import set_current_vllm_config

from tests.families.case import Case
from tests.serve.sizes import tiny_model
from visionzip import attach, attached, save
from visionzip.serving.vllm_model import sizes_only
from visionzip.serving.vllm_plugin import ARCHITECTURE, register

ANSWER = 12
STEP = 2048
"""Tokens of a step of the engine."""


def unwatched(model: Any) -> Any:
    """`model` as if vLLM had not decorated transformers' class of its LLM."""
    for module in model.modules():
        module.do_not_compile = True
    return model


@dataclass
class Served:
    """One directory under both."""

    model: Any
    processor: Any
    llm: Any

    @classmethod
    def of(cls, case: Case, place: Path, **options: Any) -> Served:
        with set_current_vllm_config(sizes_only(SimpleNamespace(hf_config=case.config()))):
            model, processor = unwatched(tiny_model(case)), case.processor()
            attach(model, processor, case.budget)
            save(model, place, "merged", processor=processor)
        return cls(model, processor, start(place, **options))

    @property
    def served(self) -> Any:
        """The model inside of the engine."""
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        return runner.model

    def generate(self, prompt: str, images: list[Any], tokens: int = ANSWER) -> tuple[list[int], list[int]]:
        """transformers: ids of the prompt, ids of the answer."""
        inputs = self.processor(text=[prompt], images=images or None, return_tensors="pt")
        with torch.no_grad():
            found = self.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        length = inputs["input_ids"].shape[1]
        return inputs["input_ids"][0].tolist(), found[0, length:].tolist()

    def ask(self, requests: list[dict[str, Any]], tokens: int = ANSWER) -> list[Any]:
        """vLLM: the requests together."""
        from vllm import SamplingParams

        options = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, bad_words=None, logit_bias=self._never()
        )
        return self.llm.generate(requests, options, use_tqdm=False)

    def _never(self) -> dict[int, float] | None:
        suppressed = self.model.generation_config.suppress_tokens or []
        return dict.fromkeys(suppressed, -100.0) or None

    def embeddings(self, requests: list[dict[str, Any]]) -> list[torch.Tensor]:
        """What vLLM's model makes of the requests' images, in the order of its steps."""
        seen: list[torch.Tensor] = []
        embed = type(self.served).embed_multimodal

        def watched(**kwargs: Any) -> Any:
            found = embed(self.served, **kwargs)
            seen.extend(each.detach().clone() for each in found)
            return found

        self.served.__dict__["embed_multimodal"] = watched
        try:
            self.ask(requests, 1)
        finally:
            del self.served.__dict__["embed_multimodal"]
        return seen

    def expected(self, images: list[Any], prompt: str) -> list[torch.Tensor]:
        """The same by the library."""
        attachment = attached(self.model)
        assert attachment is not None
        inputs = attachment.family.image_inputs(self.processor(text=[prompt], images=images, return_tensors="pt"))
        return attachment.project(attachment.compress(**inputs))


def start(place: Path, **options: Any) -> Any:
    """vLLM on a merged directory, as `visionzip serve` starts it, in float32."""
    from vllm import LLM

    register()  # what the entry point does where the package is installed
    return LLM(
        str(place),
        hf_overrides={"architectures": [ARCHITECTURE]},
        dtype="float32",
        enforce_eager=True,
        **{
            "max_model_len": 2048,
            "max_num_seqs": 32,
            "max_num_batched_tokens": STEP,
            "block_size": 32,
            "limit_mm_per_prompt": {"image": 3},
            **options,
        },
    )


def request(prompt: str, images: list[Any], **kwargs: Any) -> dict[str, Any]:
    """What ``LLM.generate`` takes."""
    return {"prompt": prompt, **({"multi_modal_data": {"image": images}} if images else {}), **kwargs}
