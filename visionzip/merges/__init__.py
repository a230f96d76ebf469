"""Merges: what becomes of the tokens that are not kept. One file each; a new one is a new file with one registration."""

from visionzip.merges.base import MERGES, Groups, Merge, merge

__all__ = ["MERGES", "Groups", "Merge", "merge"]
