"""Selectors: which patches are kept as they are. One file each; a new one is a new file with one registration."""

from visionzip.selectors.base import SELECTORS, Features, Selector, joined, rows, selector

__all__ = ["SELECTORS", "Features", "Selector", "joined", "rows", "selector"]
