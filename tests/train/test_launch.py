"""The port that ranks meet at."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from train import launch


def test_a_port_that_is_free_and_not_one_of_the_kernels_own() -> None:
    port = launch.free_port()
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", port))
    told = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(told.read_text().split()[0]) if told.exists() else 32_768
    assert 20_000 <= port < 32_000
    assert port < first or first < 20_000, "the kernel could give it to a connection"


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    free = launch.free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        offered = [taken.getsockname()[1], free]
        monkeypatch.setattr(launch.random, "SystemRandom", lambda: SimpleNamespace(sample=lambda *given: offered))
        assert launch.free_port() == free
        monkeypatch.setattr(launch.random, "SystemRandom", lambda: SimpleNamespace(sample=lambda *given: offered[:1]))
        with pytest.raises(OSError, match="no free TCP port"):
            launch.free_port()
