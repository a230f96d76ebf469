"""What a launcher says in the environment, read as it is meant."""

import pytest
import torch

from data import processes


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.rank_and_world() == (0, 1)


def test_number_and_count_are_of_all_nodes(monkeypatch):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert processes.rank_and_world() == (9, 16)


@pytest.mark.parametrize(("local", "visible", "expected"), [(None, 8, 0), ("3", 8, 3), ("3", 1, 0)])
def test_the_own_gpu_is_that_of_the_local_rank_and_becomes_the_current_one(monkeypatch, local, visible, expected):
    made_current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setenv("RANK", "11")  # on the second node of eight GPUs each
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert processes.own_device() == torch.device("cuda", expected)
    assert made_current == [torch.device("cuda", expected)]


def test_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.own_device() == torch.device("cpu")
