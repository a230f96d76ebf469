"""What every test gets. The builders are in tests/tiny.py."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once instead of waiting
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.tiny import tiny_llava, tiny_processor


@pytest.fixture
def model():
    return tiny_llava()


@pytest.fixture
def processor():
    return tiny_processor()


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are saved meanwhile, in order."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: saved.append(figure) or save(figure, *args, **options))  # fmt: skip
    return saved
