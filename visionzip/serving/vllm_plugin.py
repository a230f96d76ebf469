"""The entry point of ``vllm.general_plugins``: vLLM calls `register` in each of its processes, whatever it is going to serve."""

from __future__ import annotations

#: what a model is started with (``--hf-overrides '{"architectures": [ARCHITECTURE]}'``) to be served by `visionzip.serving.vllm_model`
ARCHITECTURE = "VisionZipForConditionalGeneration"


def register() -> None:
    """Tell vLLM about one more model class. Nothing that vLLM has is replaced; the class is imported when a model asks for it."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "visionzip.serving.vllm_model:CompressedForConditionalGeneration")
