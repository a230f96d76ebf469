"""Scripts that are given what they can't use say so in one sentence and end with 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import compare_device, elastic, measure_real
from scripts.bad_input import exit_code_of


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        (elastic, "--out {0}/out --config {0}/no.yaml", "there is no config file"),
        (elastic, "--out {0}/out nope=3", "nope: no such key"),
        (measure_real, "--model {0}/no --data {0}/no", "No such file"),
        (compare_device, "--model {0} --export {0} --data {0}/a.json --images {0}", "is not an ONNX export"),
        (compare_device, "--model {0} --export {0}/no --data {0}/a.json --images {0}", "there is nothing at"),
    ],
)
def test_bad_input_is_2_and_one_sentence(script, given, message, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *given.format(tmp_path).split()])
    assert exit_code_of(script.main) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert list(tmp_path.iterdir()) == [], "nothing was begun"
