"""`visionzip <command>`: finds the command's file and runs it. Nothing else is imported before.

Commands of the library lie in ``visionzip/commands/``. Those of the training program (`PROGRAM`) lie in the checkout that this
package stands in; they are not part of the wheel, and the library imports nothing of them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import errno
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import visionzip
import visionzip.commands

CHECKOUT = Path(visionzip.__file__).resolve().parents[1]
#: commands of the training program → their modules, in the order in which they are needed
PROGRAM = {
    "init": "train.commands.init",
    "data": "data.commands.inspect",
    "plan": "train.commands.plan",
    "cache": "data.commands.cache",
    "train": "train.commands.train",
    "evaluate": "train.commands.evaluate",
    "budget": "train.commands.budget",
    "sweep": "train.commands.sweep",
}
GET_PROGRAM = (
    "is part of the training program, which runs from a checkout of the repository and is not in the installed package: "
    "clone it and run `pip install -e '.[train]'` there (docs/training.md)"
)
STORAGE_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)
FAILED, WRONG_USE, STORAGE, INTERRUPTED = 1, 2, 74, 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    2: the command line or what it names can't be used, said in one line. 74: a file could not be written. 1: anything else that
    went wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv:
        parser.print_help()
        return WRONG_USE
    name = parser.parse_args(argv[:1]).command
    if name in PROGRAM and not has_program():
        print(f"visionzip {name}: {name} {GET_PROGRAM}", file=sys.stderr)
        return WRONG_USE
    silence_torchao()
    command = import_command(name)
    inner = argparse.ArgumentParser(
        f"visionzip {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(inner)
    if getattr(command, "PASSES_ON", False):  # options of another program
        arguments, others = inner.parse_known_args(argv[1:])
        arguments.others = others
    else:
        arguments = inner.parse_intermixed_args(argv[1:])
    light = getattr(command, "without_torch", lambda arguments: False)(arguments)
    if name not in PROGRAM and not light:  # the program says for itself what is printed by which rank
        silence_libraries()
    return guarded(name, command.run, arguments)


def guarded(name: str, run: Any, arguments: argparse.Namespace) -> int:
    """Exit code of ``run(arguments)``; expected kinds of failure are one line on stderr."""
    try:
        return int(run(arguments) or 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `visionzip inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            where = error.filename or "a file"
            print(f"visionzip {name}: {where} could not be written: {error.strerror}", file=sys.stderr)
            return STORAGE
        print(f"visionzip {name}: {error}", file=sys.stderr)
        return WRONG_USE
    except ValueError as error:
        print(f"visionzip {name}: {message_of(error)}", file=sys.stderr)
        return WRONG_USE
    except ImportError as error:
        print(f"visionzip {name}: {error}", file=sys.stderr)
        return FAILED


def has_program() -> bool:
    """Whether this package stands in a checkout, beside the training program."""
    return (CHECKOUT / "train" / "commands").is_dir() and (CHECKOUT / "train.py").is_file()


def import_command(name: str) -> Any:
    """The module of a command, the checkout's packages made importable where it is one of theirs."""
    if name not in PROGRAM:
        return importlib.import_module(f"visionzip.commands.{name}")
    if str(CHECKOUT) not in sys.path:  # the console script puts its own directory there instead
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(PROGRAM[name])


def library_commands() -> dict[str, str]:
    """Name → the first line of the file's docstring."""
    modules = pkgutil.iter_modules(visionzip.commands.__path__)
    names = [module.name for module in modules if not module.name.startswith("_")]
    return {name: summary(Path(visionzip.commands.__path__[0]) / f"{name}.py") for name in names}


def program_commands() -> dict[str, str]:
    """The same of the training program; empty where only the wheel is installed."""
    if not has_program():
        return {}
    files = {name: CHECKOUT / f"{module.replace('.', '/')}.py" for name, module in PROGRAM.items()}
    return {name: summary(file) for name, file in files.items() if file.is_file()}


def summary(path: Path) -> str:
    """The first line of a file's docstring, read without importing it (and torch with it)."""
    line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return line[:1].lower() + line[1:].rstrip(".")


class _FrontDoor(argparse.ArgumentParser):
    """Suggests a command for one that does not exist."""

    def __init__(self, known: Iterable[str], **options: Any) -> None:
        super().__init__(**options)
        self.known = list(known)
        self.add_argument("command", metavar="command", type=self.command, help=argparse.SUPPRESS)

    def command(self, name: str) -> str:
        if name not in self.known:
            close = difflib.get_close_matches(name, self.known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(self.known))}"
            raise argparse.ArgumentTypeError(f"no command {name!r}; {hint}")
        return name

    def error(self, message: str) -> NoReturn:
        super().error(message.removeprefix("argument command: "))


def _parser() -> argparse.ArgumentParser:
    library, program = library_commands(), program_commands()

    def listed(found: dict[str, str]) -> str:
        return "\n".join(f"  {name:<11} {line}" for name, line in found.items())

    training = listed(program) if program else f"  {', '.join(PROGRAM)}: from a checkout (docs/training.md)"
    parser = _FrontDoor(
        [*library, *PROGRAM],
        prog="visionzip",
        usage="visionzip <command> …",
        description="Vision-language models on a tenth of their visual tokens.",
        epilog=f"use, look, share:\n{listed(library)}\n\ntrain:\n{training}\n\nRun visionzip <command> --help for details.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"visionzip-ft {visionzip.__version__}")
    return parser


def message_of(error: Exception) -> str:
    """What went wrong, in one line where pydantic would use many."""
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return str(error)
    lines = [(".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")) for one in errors()]
    return "; ".join(f"{place}: {text}" if place else text for place, text in lines)


def silence_torchao() -> None:
    """transformers imports torchao where it is installed, which then names every kernel that this machine can't load."""
    import logging

    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_libraries() -> None:
    """Let libraries log warnings only, so that the output is the command's own."""
    import logging

    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        # DeepSpeed, where it is installed, is imported by others and says so
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
