"""What a rank says of an error: its own with a traceback, another rank's end in a line."""

from __future__ import annotations

import pytest
from safetensors import SafetensorError
from torch.distributed import DistBackendError

from train import guard
from train.ending import Exit

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, "
GONE = (
    f"{NCCL}remote process exited or there was a network error, NCCL version 2.27.5\nncclRemoteError: A call failed",
    f"{NCCL}internal error, NCCL version 2.14.3\nLast error:\nNet : Connection closed by remote peer node3<50260>",
    "NCCL communicator was aborted on rank 2. Original reason for failure was: watchdog timeout",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.4]:51232",
)
OWN = (
    f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nCuda failure 2 'out of memory'",
    f"{NCCL}invalid usage, NCCL version 2.27.5\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
)


def said(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: Exit = Exit.ERROR
) -> str:
    def fail() -> int:
        raise error

    monkeypatch.setattr(guard.time, "sleep", lambda seconds: None)
    assert guard.run_guarded(fail) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("text", GONE)
def test_another_rank_is_gone(text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = said(DistBackendError(text), capsys, monkeypatch)
    assert "lost the connection to another rank" in found
    assert text.splitlines()[0] in found
    assert "Traceback" not in found


@pytest.mark.parametrize("text", OWN)
def test_an_error_of_nccl_that_is_our_own(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = said(DistBackendError(text), capsys, monkeypatch)
    assert "unexpected error" in found
    assert "Traceback" in found
    assert text in found


def test_a_full_disk_under_a_library_that_has_errors_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save_pretrained` writes through safetensors."""
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    said_of = said(error, capsys, monkeypatch, Exit.STORAGE)
    assert "run ended with exit code 74: a file of this run could not be written: No space left on device" in said_of
    assert "Traceback" not in said_of
    assert "Traceback" in said(SafetensorError("Error while deserializing header"), capsys, monkeypatch)
