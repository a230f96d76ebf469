"""upload an export to a hub repository, with its model card

  visionzip push runs/demo somebody/tiny-llava-visionzip-16
  visionzip push runs/demo-merged somebody/tiny-llava-visionzip-16-merged

The card says what was trained and measured, for which budgets, and how to use it with transformers, vLLM and ONNX Runtime.
Uses the token of `hf auth login`, and the hub that HF_ENDPOINT names.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="a run's directory, or what `visionzip export` wrote")
    parser.add_argument("repository", help="owner/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create it as a private repository")
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--message", help="commit message")


def run(arguments: argparse.Namespace) -> None:
    from visionzip.hub import push

    print(
        push(
            arguments.directory,
            arguments.repository,
            private=arguments.private,
            revision=arguments.revision,
            message=arguments.message,
        )
    )
