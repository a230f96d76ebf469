"""What `python -m scripts.benchmark` runs: one file a benchmark. Needs torch, transformers and what `visionzip` imports."""
