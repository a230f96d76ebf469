"""What something on disk is, in plain words: one function a kind, each in the file of its like."""

from visionzip.describe.base import Description, describe, show, size

__all__ = ["Description", "describe", "show", "size"]
