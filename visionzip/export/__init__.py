"""What was trained, on disk: one file a format; a new one is a new file with one registration."""

from visionzip.export.base import FORMATS, Format, Trained, load_into, read, recognise

__all__ = ["FORMATS", "Format", "Trained", "load_into", "read", "recognise"]
