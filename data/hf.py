"""Records of anything the `datasets` library reads: Parquet, Arrow, local folders, hub names.

Rows are taken as Arrow gives them, so an image stays the bytes it is stored as until `visionzip/images.py` decodes it: one decoder,
one set of rules for bad images, whatever the storage.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from data.config import SourceConfig


class HFRecords:
    """Random access to a `datasets.Dataset`: memory-mapped Arrow, pickled as the path of its files."""

    def __init__(self, source: SourceConfig) -> None:
        self.dataset = load_source(source).with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        return self.dataset[position].to_pylist()[0]


def load_source(source: SourceConfig, streaming: bool = False) -> Any:
    """The `datasets` object of a source.

    Raises:
        ValueError: nothing readable at the path or under the name, or no such split.
    """
    import datasets

    path = source.path
    try:
        if os.path.isdir(path) and os.path.exists(os.path.join(path, "state.json")):
            saved = datasets.load_from_disk(path)
        elif os.path.isdir(path) and os.path.exists(os.path.join(path, "dataset_dict.json")):
            saved = datasets.load_from_disk(path)[source.split]
        elif path.endswith(".arrow") and os.path.isfile(path):
            saved = datasets.Dataset.from_file(path)
        else:
            return _load_dataset(source, streaming)
        return saved.to_iterable_dataset() if streaming else saved
    except (
        Exception
    ) as error:  # `datasets` raises its own, huggingface_hub's, pyarrow's and the operating system's errors
        raise ValueError(
            f"data source {source.label!r}: {path} can't be read: {type(error).__name__}: {error}. Expected a .json/.jsonl "
            "file, a Parquet or Arrow file or pattern, a folder, or the name of a hub data set (with `subset`, `split`)"
        ) from error


def _load_dataset(source: SourceConfig, streaming: bool) -> Any:
    import datasets

    options = {"split": source.split, "streaming": streaming}
    files = sorted(glob.glob(source.path)) if glob.has_magic(source.path) else [source.path]
    if files and all(os.path.isfile(file) for file in files):
        kind = Path(files[0]).suffix.removeprefix(".").lower()
        kind = {"jsonl": "json", "ndjson": "json", "tsv": "csv"}.get(kind, kind)
        # One file is one split, whatever it is called; `datasets` calls it train.
        return datasets.load_dataset(kind, data_files=files, **{**options, "split": "train"})
    if glob.has_magic(source.path):
        raise FileNotFoundError(f"no file matches {source.path}")
    return datasets.load_dataset(source.path, source.subset, **options)
