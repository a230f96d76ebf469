"""What was trained, on disk: one file a format, which says everything about it; a new one is a new file with one registration."""

from visionzip.export.base import FORMATS, Format, Trained, read_export, recognise, run_result
from visionzip.export.header import Header
from visionzip.export.insert import load_into, loaded_into
from visionzip.export.safetensors import save_projector

__all__ = [
    "FORMATS", "Format", "Header", "Trained", "load_into", "loaded_into", "read_export", "recognise", "run_result", "save_projector",
]  # fmt: skip
