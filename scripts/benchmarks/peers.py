"""The trainers that people use instead, beside ours: same model directory, same records in each one's format, same samples a step.

The encoder and the LLM are frozen and the projector trains, in float32 on the CPU, without checkpointing of activations, in one process each,
one after the other. Each peer has a virtual environment of its own, made once from the package index under `--cache`. Peers
read all visual tokens, as they must; TRL runs a second time with a model that `visionzip.attach` has compressed.

First every trainer takes one step on the same few records: where the tokens are the same, so is the loss.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks import measure
from scripts.benchmarks.presets import PRESETS, Preset, build

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("peer_run.py")
RATE = 1e-5
LIBRARY = ("pydantic>=2", "safetensors", "pillow")
"""What `visionzip` imports beside torch and transformers."""


@dataclass(frozen=True)
class Peer:
    """A trainer. `packages`: pinned, installed after torch of this environment's version; `stubs`: import names of packages whose wheels
    on the index need CUDA, replaced by empty ones: they are imported for audio and video only."""

    kind: str
    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()


PEERS = {
    "TRL": Peer("trl", ("trl==1.16.0", "transformers==5.24.0", *LIBRARY)),
    "LLaMA-Factory": Peer(
        "llama-factory", ("llamafactory==0.9.5",), removed=("torchvision", "torchaudio"), stubs=("torchaudio",)
    ),
}


@dataclass(frozen=True)
class Way:
    """A row of the table. `budget`: what is attached, None for the untouched model; `cached`: from a token cache; `compiled`: the LLM's
    layers through torch.compile, with eager attention (`train.compiled`)."""

    kind: str
    python: Path
    budget: dict[str, int] | None = None
    cached: bool = False
    compiled: bool = False


def prepare(peer: Peer, cache: Path) -> Path:
    """The Python of the peer's environment, made where it is not there yet.

    Raises:
        RuntimeError: pip failed; its last lines are in the message.
    """
    wanted = json.dumps([torch.__version__, sys.version_info[:2], dataclasses.asdict(peer)])
    folder = cache / f"{peer.kind}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if (folder / "complete").is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making an environment with {', '.join(peer.packages)} in {folder} (once)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    torch_pin = f"torch=={torch.__version__.split('+')[0]}"
    pip(python, "install", torch_pin)
    pip(python, "install", torch_pin, *peer.packages)
    if peer.removed:
        pip(python, "uninstall", "-y", *peer.removed)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for name in peer.stubs:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text('"""Empty: the wheel on the index needs CUDA."""\n')
    (folder / "complete").touch()
    return python


def pip(python: Path, *arguments: str) -> None:
    """Raises RuntimeError with pip's last lines."""
    done = subprocess.run([python, "-m", "pip", "-q", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)} failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")


def make_tokenizer(vocabulary: int) -> Any:
    """A word for each id, so that all trainers see the same ids whatever spaces their templates write; ``<image>`` is the last id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from visionzip.templates.llava_v1 import SYSTEM

    known = ["<pad>", "</s>", "<unk>", *dict.fromkeys([*SYSTEM.split(), "USER:", "ASSISTANT:"])]
    words = [*known, *(f"w{number}" for number in range(vocabulary - len(known) - 1)), "<image>"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def make_model(preset: Preset, folder: Path) -> None:
    """A model directory of the preset's shapes with random weights, its processor and LLaVA's conversation as chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    from visionzip.templates.llava_v1 import SYSTEM

    model = build(preset, torch.device("cpu"))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    side, patch = preset.vision["image_size"], preset.vision["patch_size"]
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    chat = (
        SYSTEM
        + " {% for message in messages %}{% if message['role'] == 'user' %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}ASSISTANT:{% else %}"
        "{% for part in message['content'] %} {{ part['text'] }} {% endfor %}</s>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(preset.text["vocab_size"])
    LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=chat
    ).save_pretrained(folder)  # fmt: skip


def make_records(folder: Path, count: int, vocabulary: int, side: int) -> None:
    """`count` records of an image, a question and an answer, some 220 tokens of text with the system sentence: in LLaVA's JSON (also
    LLaMA-Factory's, with its `dataset_info.json`) and as TRL's prompts and completions."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows, prompts, shared = [], [], []
    words = lambda number: " ".join(f"w{word}" for word in draw.integers(0, vocabulary - 64, number))  # noqa: E731
    for number in range(count):
        image = folder / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(image)
        question, answer = words(int(draw.integers(40, 160))), words(int(draw.lognormal(4.2, 0.6)) + 1)
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": image.name, "conversations": turns})
        shared.append({"conversations": turns, "images": [str(image)]})
        prompts.append({
            "prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}],
            "images": [str(image)],
        })  # fmt: skip
    info = {"records": {"file_name": "shared.json", "formatting": "sharegpt",
                        "columns": {"messages": "conversations", "images": "images"}}}  # fmt: skip
    written = {"ours.json": rows, "trl.json": prompts, "shared.json": shared, "dataset_info.json": info}
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value))


def our_config(
    preset: Preset,
    work: Path,
    records: Path,
    out: Path,
    steps: int,
    budget: dict[str, int],
    cache: Path | None,
    compiled: bool = False,
) -> Path:
    """The config of our run, written beside `out`."""
    import yaml

    config = {
        "output_dir": str(out), "zip": budget,
        "model": {"path": str(work / "model"), "dtype": "float32", "attn_implementation": "eager" if compiled else None},
        "data": {
            "sources": [{"path": str(records / "ours.json"), "images": str(records)}], "template": "llava_v1", "max_length": 4096,
            "cache": None if cache is None else str(cache), "cache_dir": str(work / "index"),
        },
        "trainer": {
            "deepspeed": "off", "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_steps": steps,
            "per_device_train_batch_size": preset.batch, "global_batch_size": preset.batch, "logging_steps": 1,
            "save_strategy": "no", "dataloader_num_workers": 0, "torch_compile": compiled,
        },
        "wandb": {"enabled": False}, "report": {"enabled": False},
    }  # fmt: skip
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def measured(kind: str, python: Path, spec: dict[str, Any], log: Path) -> dict[str, Any]:
    """Run it to its end; what the probe found, with the largest memory of the process in bytes.

    Raises:
        RuntimeError: it failed; the last lines of its log are in the message.
    """
    path = Path(spec["out"]).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(spec))
    threads = str(spec["threads"] or os.cpu_count() or 1)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT) if kind != "llama-factory" else "", "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(path.parent / "datasets"), "WANDB_MODE": "disabled", "DISABLE_VERSION_CHECK": "1",
        "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    with open(log, "w") as file:
        process = subprocess.Popen(
            [python, str(RUNNER), kind, str(path)], env=environment, stdout=file, stderr=file, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = " ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise RuntimeError(f"{kind} ended with {process.returncode}; see {log}: {last[-400:]}")
    found = json.loads((Path(spec["out"]) / "probe.json").read_text())
    return {**found, "peak_bytes": usage.ru_maxrss * 1024}


def run(name: str, cache: Path, steps: int, rounds: int, only: list[str], threads: int | None) -> dict[str, Any]:
    """Every trainer's rows. `steps` of a timed run; `only`: names of `PEERS`, all where it is empty."""
    preset = PRESETS[name]
    work = cache / "work" / name
    shutil.rmtree(work, ignore_errors=True)
    make_model(preset, work / "model")
    make_records(work / "records", preset.batch * steps, preset.text["vocab_size"], preset.vision["image_size"])
    make_records(work / "few", preset.batch, preset.text["vocab_size"], preset.vision["image_size"])
    compressed = {"dominant": preset.dominant, "contextual": preset.contextual}
    everything = {"dominant": preset.full + 1, "contextual": 0}
    ways: dict[str, Way] = {}
    skipped: dict[str, str] = {}
    for label, peer in PEERS.items():
        if only and label not in only:
            continue
        try:
            python = prepare(peer, cache / "environments")
        except (RuntimeError, subprocess.CalledProcessError) as error:
            skipped[label] = str(error)
            continue
        ways[label] = Way(peer.kind, python)
        if peer.kind == "trl":
            ways[f"{label} + attach"] = Way(peer.kind, python, compressed)
    here = Path(sys.executable)
    ways["ours, all tokens"] = Way("ours", here, everything)
    ways["ours"] = Way("ours", here, compressed)
    ways["ours, token cache"] = Way("ours", here, compressed, cached=True)
    ways["ours, compiled"] = Way("ours", here, compressed, compiled=True)
    ways["ours, token cache, compiled"] = Way("ours", here, compressed, cached=True, compiled=True)

    def once(label: str, records: Path, count: int, what: str) -> dict[str, Any]:
        way = ways[label]
        out = work / "runs" / f"{what}-{label.replace(' ', '-').replace(',', '')}"
        spec: dict[str, Any] = {
            "model": str(work / "model"), "out": str(out), "batch": preset.batch, "steps": count, "rate": RATE, "zip": way.budget,
            "trl": str(records / "trl.json"), "llama_factory": str(records), "threads": threads,
        }  # fmt: skip
        if way.kind == "ours":
            tokens = work / "tokens" / records.name if way.cached else None
            spec["config"] = str(
                our_config(preset, work, records, out, count, way.budget or everything, tokens, way.compiled)
            )
            if tokens is not None and not tokens.exists():
                command = [here, "-m", "data.cache", "--config", spec["config"], "--workers", "0"]
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        print(f"{what}: {label}", file=sys.stderr, flush=True)
        return measured(way.kind, way.python, spec, out.parent / f"{out.name}.log")

    rows: dict[str, dict[str, Any]] = {}
    for label in list(ways):
        try:
            rows[label] = {"first_loss": once(label, work / "few", 1, "loss")["losses"][0], "rounds": []}
        except RuntimeError as error:
            skipped[label] = str(error)
    for number in range(rounds):
        for label in rows:
            rows[label]["rounds"].append(once(label, work / "records", steps, f"round-{number}"))
    for row in rows.values():
        best = min(row["rounds"], key=lambda found: found["seconds"])
        row |= {
            "samples_per_second": preset.batch / best["seconds"], "tokens_per_sample": best["tokens_per_step"] / preset.batch,
            "peak_bytes": max(found["peak_bytes"] for found in row["rounds"]), "trained": best["trained"],
        }  # fmt: skip
    fastest = max((rows[label]["samples_per_second"] for label in rows if label in PEERS), default=None)
    if fastest:
        for row in rows.values():
            row["faster_than_peers"] = row["samples_per_second"] / fastest
    return {"preset": name, "steps": steps, "batch": preset.batch, "rows": rows, "skipped": skipped}


def show(result: dict[str, Any]) -> str:
    lines = [
        [label, f"{row['samples_per_second']:.3f}", f"{row['faster_than_peers']:.2f}x" if "faster_than_peers" in row else "",
         f"{row['tokens_per_sample']:.0f}", f"{row['peak_bytes'] / 2**30:.2f}", f"{row['first_loss']:.4f}"]
        for label, row in result["rows"].items()
    ]  # fmt: skip
    headers = [
        "trainer",
        "samples/s",
        "of the better peer",
        "tokens through the LLM per sample",
        "peak GiB",
        "first loss",
    ]
    title = f"{result['preset']}: {result['batch']} samples per step, {result['steps']} steps, float32; the best of the rounds"
    left = "".join(f"\n\n{label}: left out, {why}" for label, why in result["skipped"].items())
    return f"{title}\n\n{measure.table(headers, lines)}{left}"
