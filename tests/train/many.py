"""Runs several configs one after the other in the same processes: importing torch costs more than these runs.

deepspeed tests/train/many.py first.yaml second.yaml …
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from train.config import load_config
from train.guard import run_guarded
from train.run import run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("configs", nargs="+")
    for path in parser.parse_args().configs:
        code = run_guarded(lambda path=path: run(load_config(path)))  # type: ignore[misc]
        gc.collect()  # the last run's engine, before the next one is built
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
