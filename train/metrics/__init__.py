"""Metrics: what an answer is worth. One file each; a new one is a new file with one registration."""

from train.metrics.base import METRICS, Metric, normalise_answer

__all__ = ["METRICS", "Metric", "normalise_answer"]
