"""`visionzip <command>`: finds the command's file in ``visionzip/commands/`` and runs it. Nothing else is imported before."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import pkgutil
import sys

import visionzip.commands


def commands() -> dict[str, str]:
    """Name → the first line of the file's docstring, read without importing it (and torch with it)."""
    found = {}
    for module in pkgutil.iter_modules(visionzip.commands.__path__):
        if not module.name.startswith("_"):
            spec = importlib.util.find_spec(f"visionzip.commands.{module.name}")
            source = spec.loader.get_source(spec.name) if spec and spec.loader else ""  # type: ignore[attr-defined]
            found[module.name] = (ast.get_docstring(ast.parse(source or "")) or "").split("\n")[0]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. 1: it failed, with one line that says why; 2: it was not called right."""
    argv = sys.argv[1:] if argv is None else argv
    known = commands()
    parser = argparse.ArgumentParser(
        prog="visionzip",
        usage="visionzip <command> …",
        description="Vision-language models on a tenth of their visual tokens.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<11} {line}" for name, line in known.items())
        + "\n\nvisionzip <command> --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=known, metavar="command", help=argparse.SUPPRESS)
    if not argv:
        parser.print_help()
        return 2
    name = parser.parse_args(argv[:1]).command
    command = importlib.import_module(f"visionzip.commands.{name}")
    inner = argparse.ArgumentParser(
        prog=f"visionzip {name}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(inner)
    arguments = inner.parse_args(argv[1:])
    quiet()
    try:
        return int(command.run(arguments) or 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `visionzip inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"visionzip {name}: {reason(error)}", file=sys.stderr)
        return 1


def reason(error: Exception) -> str:
    """What went wrong, without pydantic's surroundings."""
    found = getattr(error, "errors", None)
    if not callable(found):
        return str(error)
    said = [(".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")) for one in found()]
    return "; ".join(f"{place}: {text}" if place else text for place, text in said)


def quiet() -> None:
    """A command speaks for itself: libraries only when something is wrong."""
    import logging

    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed, where it is installed, is imported by others and says so
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
