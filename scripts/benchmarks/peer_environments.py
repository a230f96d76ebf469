"""A virtual environment for each trainer that `scripts.benchmark peers` compares with, made once and reused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY = ("pydantic>=2", "safetensors", "pillow")
"""What `visionzip` imports beside torch and transformers."""
PROGRAM = ("omegaconf>=2.3",)
"""What `train.py` needs beside that and what TRL brings (accelerate, datasets)."""


@dataclass(frozen=True)
class Peer:
    """A trainer. `packages` are pinned and installed beside the version of torch that runs here. `removed` are packages whose wheels
    are built for CUDA and fail to import beside a CPU build of torch; `stubs` are those of them that are imported although nothing here
    needs them (audio), replaced by empty packages."""

    kind: str
    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()


PEERS = {
    "TRL": Peer("trl", ("trl==1.16.0", "transformers==5.24.0", *LIBRARY)),
    "LLaMA-Factory": Peer(
        "llama-factory", ("llamafactory==0.9.5",), removed=("torchvision", "torchaudio"), stubs=("torchaudio",)
    ),
    "ms-swift": Peer("ms-swift", ("ms-swift==4.6.0",)),
}


def make_environment(peer: Peer, folder: Path, wheels: Path | None = None) -> Path:
    """The Python of the peer's environment under `folder`, made if it is not there yet.

    `wheels`: for machines without a package index: install from this folder alone, beside torch and whatever else is installed for the
    Python that runs this, and what `train.py` needs along with it.

    Raises:
        RuntimeError: pip failed; its last lines are in the message.
    """
    described = [torch.__version__, sys.version_info[:2], dataclasses.asdict(peer)]
    if wheels is not None:
        described.append(str(wheels.resolve()))
    environment = folder / f"{peer.kind}-{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]}"
    python = environment / "bin" / "python"
    if (environment / "complete").is_file():
        return python
    shutil.rmtree(environment, ignore_errors=True)
    print(f"making an environment with {', '.join(peer.packages)} in {environment} (once)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    (site,) = (environment / "lib").glob("python*/site-packages")
    if wheels is None:
        torch_pin = f"torch=={torch.__version__.split('+')[0]}"
        run_pip(python, "install", torch_pin)
        run_pip(python, "install", torch_pin, *peer.packages)
    else:
        # Not --system-site-packages: that would leave out what a virtual environment that runs this has.
        (site / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        run_pip(
            python, "uninstall", "-y", "setuptools"
        )  # an old one that Python 3.11 puts here; the outer one is newer
        run_pip(python, "install", "--no-index", "--find-links", str(wheels), *peer.packages, *PROGRAM)
    if peer.removed and not torch.cuda.is_available():
        run_pip(python, "uninstall", "-y", *peer.removed)
        for name in peer.stubs:
            (site / name).mkdir()
            (site / name / "__init__.py").write_text('"""Empty: the wheel on the index needs CUDA."""\n')
    (environment / "complete").touch()
    return python


def run_pip(python: Path, *arguments: str) -> None:
    """Raises RuntimeError with pip's last lines."""
    done = subprocess.run([python, "-m", "pip", "-q", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)} failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")
