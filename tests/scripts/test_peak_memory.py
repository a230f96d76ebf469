"""`scripts.peak_memory`: the sum over a command's processes."""

import sys

import pytest

from scripts import peak_memory

HOLD = "import subprocess, sys, time; held = b'x' * (64 << 20); {start}; time.sleep(1.5)"


def hold(processes: int) -> list[str]:
    """A command whose `processes` processes, each the child of the one before, hold 64 MiB each for more than a second."""
    code = HOLD.format(start="pass")
    for _ in range(processes - 1):
        code = HOLD.format(start=f"subprocess.Popen([sys.executable, '-c', {code!r}])") + "; time.sleep(0.5)"
    return [sys.executable, "-c", code]


def test_children_of_children_count():
    code, one = peak_memory.run(hold(1))
    assert code == 0
    _, three = peak_memory.run(hold(3))
    assert 64 << 20 < one < 110 << 20
    assert three - one > 2 * (60 << 20)


def test_the_commands_exit_code(capsys):
    assert peak_memory.main([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert "peak memory of all processes: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [([], "a command is needed"), (["/no/such/program"], "/no/such/program can't be started: No such file")],
)
def test_refusals(command, message, capsys):
    with pytest.raises(SystemExit):
        peak_memory.main(command)
    assert message in capsys.readouterr().err
