"""download an export from a hub repository

  visionzip pull somebody/tiny-llava-visionzip-16 --out runs/theirs

Prints where it is and what it is. Uses the hub that HF_ENDPOINT names.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("--out", help="directory to put it in (default: the hub's cache)")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")


def run(arguments: argparse.Namespace) -> None:
    from visionzip.hub import pull
    from visionzip.inspect import describe, print_description

    path = pull(arguments.repository, arguments.out, revision=arguments.revision)
    print(path)
    print_description(describe(path))
