"""What all commands of `data` have in common: how a config is named, how failures are reported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from data.config_file import ConfigError
from data.storage import STORAGE_EXIT, storage_message


def start(command: Any, program: str, arguments: Sequence[str] | None) -> int:
    """Parse `arguments` (default: the process's own) for the module `command` and run it; returns the exit code."""
    parser = argparse.ArgumentParser(
        program,
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return int(command.run(parser.parse_intermixed_args(arguments)))


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a run's YAML file; its sections model, zip and data are read")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the file, e.g. data.max_length=1024"
    )


def run_guarded(program: str, action: Callable[[], int]) -> int:
    """Exit code of `action`. An expected failure is one line on stderr: 2 for a mistake of the caller, 74 for a disk that is full."""
    try:
        return action()
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
    except OSError as error:
        if message := storage_message(error):
            print(f"\n{message}", file=sys.stderr)
            return STORAGE_EXIT
        said = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"{program}: {said}", file=sys.stderr)
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2
