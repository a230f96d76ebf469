"""`model.dtype: auto`: bfloat16 only where a product of it was seen to work."""

from __future__ import annotations

import os
import signal

import pytest

from data import precision
from data.config import ModelSection


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    precision.suitable_dtype.cache_clear()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    yield
    precision.suitable_dtype.cache_clear()


def illegal_instruction() -> None:
    os.kill(os.getpid(), signal.SIGILL)


def test_a_product_that_works(monkeypatch):
    monkeypatch.setattr(precision, "_multiply", lambda: None)
    assert precision.suitable_dtype() == "bfloat16"
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_amx_that_is_advertised_and_kills_is_left_alone(monkeypatch):
    def only_without_amx() -> None:
        if os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX512_CORE_BF16":
            illegal_instruction()

    monkeypatch.setattr(precision, "_multiply", only_without_amx)
    assert ModelSection(path="x", dtype="auto").dtype == "bfloat16"
    assert os.environ.pop("ONEDNN_MAX_CPU_ISA") == "AVX512_CORE_BF16"


def test_what_never_works_is_float32(monkeypatch):
    monkeypatch.setattr(precision, "_multiply", illegal_instruction)
    assert ModelSection(path="x", dtype="auto").dtype == "float32"
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_a_wrong_product_or_one_that_hangs_does_not_work(monkeypatch):
    monkeypatch.setattr(precision, "_multiply", lambda: 1 / 0)
    assert not precision.survives_bfloat16()
    monkeypatch.setattr(precision, "_LONGEST", 1)
    monkeypatch.setattr(precision, "_multiply", signal.pause)
    assert not precision.survives_bfloat16()


def test_a_value_given_by_hand_stays(monkeypatch):
    monkeypatch.setattr(precision, "_multiply", illegal_instruction)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert precision.suitable_dtype() == "float32"
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_a_processor_without_the_instructions_is_not_tried(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(precision, "survives_bfloat16", lambda isa=None: pytest.fail("tried"))
    assert precision.suitable_dtype() == "float32"


@pytest.mark.parametrize(
    ("flags", "has"), [("fpu avx512_bf16", True), ("fpu amx_bf16 amx_tile", True), ("fpu avx2", False)]
)
def test_flags(tmp_path, monkeypatch, flags, has):
    monkeypatch.undo()
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert precision.multiplies_bfloat16(tmp_path / "cpuinfo") is has
    assert not precision.multiplies_bfloat16(tmp_path / "missing")
