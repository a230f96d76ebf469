"""What all commands have in common: `--config` and `key=value`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from train.config import RunConfig, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="the YAML file of a run; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the file, e.g. trainer.learning_rate=1e-4"
    )


def read_config(arguments: argparse.Namespace, also: Sequence[str] = ()) -> RunConfig:
    """The config that the command line names.

    Raises:
        ConfigError: every mistake in it.
    """
    return load_config(arguments.config, [*arguments.overrides, *also])
