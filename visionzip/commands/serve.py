"""serve a model behind an OpenAI-compatible address, on vLLM or on transformers' own server

  visionzip serve runs/demo                                                    at http://127.0.0.1:8000/v1
  visionzip serve runs/demo --budget 32 --max-model-len 4096 --max-num-seqs 64
  visionzip serve runs/demo --engine transformers                              without vLLM

Takes whatever was trained or exported; what is not a `merged` directory yet is written as one first. Options that are not listed
here go to `vllm serve` as they are. Only this machine can reach the server, unless --host says otherwise; images come inside of the
requests (data: URLs), and no file and no other address is read for one. docs/serving.md says more.
"""

from __future__ import annotations

import argparse

from visionzip.argument_types import at_least

#: what `add_arguments` does not know is in ``arguments.others``
PASSES_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run's directory, or an export of any format: file, directory or hub id")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="default: %(default)s")
    parser.add_argument(
        "--budget", metavar="N", help="visual tokens per image: 64, 54+10 or a share (default: as trained)"
    )
    parser.add_argument(
        "--request-budgets",
        action="store_true",
        help='vllm: requests may name a smaller budget, "mm_processor_kwargs": {"budget": 32} (default: refused)',
    )
    parser.add_argument(
        "--merged", metavar="DIR", help="where the merged directory is written, to be used again (default: temporary)"
    )
    parser.add_argument("--base", help="the model that a projector belongs to, if not the one it names")
    parser.add_argument("--force", action="store_true", help="load a projector although it was trained on another base")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: float32, bfloat16, float16 (default: as stored)"
    )
    parser.add_argument(
        "--images", type=at_least(1), default=4, help="images that a request may contain (default: %(default)s)"
    )
    parser.add_argument("--name", help="the model's name in requests (default: the directory's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--print",
        action="store_true",
        dest="only_print",
        help="print the engine's command and the curl line; start nothing",
    )


def run(arguments: argparse.Namespace) -> int:
    from visionzip.serving import launch

    return launch.serve(arguments, arguments.others)
