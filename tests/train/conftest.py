"""One workspace for all tests of a process; nothing in it is written to but the caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.workspace import Ranks, make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Real processes without the seconds of importing; see tests/train/zygote.py."""
    started = Ranks()
    yield started
    started.close()
