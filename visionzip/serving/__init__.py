"""Serving compressed models: what `visionzip serve` starts, and the plugin by which vLLM compresses inside of its own engine."""
