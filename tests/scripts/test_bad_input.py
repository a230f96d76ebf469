"""Scripts that are given what they can't use say so in one sentence and end with 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import compare_device, elastic, measure_real, serve_load
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


def test_a_load_without_vllm_is_one_sentence(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_load", "runs/x", "--base", "runs/y"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        serve_load.main()
    assert left.value.code == 2
    assert "error: vLLM is not installed here; `make test-serve` sets up .venv-serve" in capsys.readouterr().err


def test_the_table_of_a_load() -> None:
    rows = [
        {"budget": "all", "requests/s": 0.5, "prompt tokens": 1600},
        {"budget": "64", "requests/s": 2.25, "prompt tokens": 90},
    ]
    assert serve_load.render(rows).splitlines() == [
        "| budget | requests/s | prompt tokens |",
        "|---|---|---|",
        "| all | 0.5 | 1,600 |",
        "| 64 | 2.25 | 90 |",
    ]
