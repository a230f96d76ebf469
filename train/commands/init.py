"""write a commented config for a model and a data file

  visionzip init data/tiny-llava runs/demo/data/train.json --images runs/demo/data/images
  visionzip init llava-hf/llava-1.5-7b-hf my/records.json --eval my/held-out.json --budget 64 --out my/run.yaml

Budget, learning rate and batch size are chosen to suit the model and the number of records; each line says why. The first records
of the data file are checked; no weights are read, nothing is prompted for, and an existing file is not overwritten.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.config import SourceConfig
from data.storage import replacing
from train.config import ConfigError, parse_config
from train.guard import run_guarded
from visionzip.budgets import format_budget, parse_budget, suitable_budget
from visionzip.config import ZipConfig
from visionzip.families import FAMILIES
from visionzip.pretrained import load_processor, read_config
from visionzip.prompts import usual_template_name
from visionzip.words import count_of

LOOKED_AT = 16
"""Records that are read to see whether the file can be used."""
STEPS = 300
"""A projector that was trained for fewer steps has hardly moved."""
EPOCHS, BATCH, SMALLEST_BATCH = 10, 128, 8
#: LLM hidden size, from → learning rate of the projector. 7B: LLaVA's recipe; the others: what the models here were trained with.
LEARNING_RATES = ((2048, "2.0e-5"), (1024, "2.0e-4"), (512, "1.0e-3"), (0, "3.0e-3"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model: directory or hub id")
    parser.add_argument("data", help="records to train on: .json, .jsonl, Parquet, or a hub data set")
    parser.add_argument("--images", help="root of relative image paths (default: the data file's folder)")
    parser.add_argument("--eval", help="held-out records, laid out the same way")
    parser.add_argument("--budget", help="visual tokens per image: 64, 54+10 or 0.1 (default: suits the model)")
    parser.add_argument("--output-dir", help="output_dir of the run (default: runs/ and the name of the config)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--out", type=Path, default=Path("run.yaml"), help="config to write (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    return run_guarded(lambda: init(arguments))


def init(arguments: argparse.Namespace) -> int:
    if arguments.out.exists():
        raise ConfigError(f"{arguments.out} exists already; remove it, or name another with --out")
    try:
        budget = parse_budget(arguments.budget) if arguments.budget else None
        model = read_model(arguments.model, arguments.trust_remote_code)
        records = look_into(arguments.data, arguments.images)
        if arguments.eval:
            look_into(arguments.eval, arguments.images)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if arguments.budget and budget is None:
        raise ConfigError(f"--budget {arguments.budget}: a run trains on compressed tokens; give fewer than all")
    text = render_config(arguments, model, records, budget or model.budget)
    import yaml

    parse_config(yaml.safe_load(text), source=str(arguments.out))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.out) as file:
        file.write(text.encode())
    print(
        f"{arguments.out}: {format_budget(budget or model.budget)} visual tokens, {count_of(records, 'record')}\n"
        f"next: visionzip data --config {arguments.out}   (what would be used and rejected)\n"
        f"      visionzip train --config {arguments.out}"
    )
    return 0


@dataclass(frozen=True)
class Model:
    """What a config has to know of a model.

    Attributes:
        hidden: size of the LLM's embeddings.
        length: tokens it can hold.
        places: whether kept tokens can have their original positions (`zip.positions`).
    """

    budget: ZipConfig
    dtype: str
    hidden: int
    length: int
    template: str
    places: bool


def read_model(path: str, trust_remote_code: bool) -> Model:
    """Sizes from the model's config, and whether its processor has a chat template.

    Raises:
        ConfigError: for what transformers can't load.
    """
    try:
        config = read_config(path, trust_remote_code=trust_remote_code)
        processor = load_processor(path, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    vision, text = getattr(config, "vision_config", None), config.get_text_config()
    if vision is None:
        raise ConfigError(f"{path} is not a vision-language model: its config has no vision_config")
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    hidden = int(text.hidden_size)
    return Model(
        budget=suitable_budget(getattr(vision, "image_size", None), getattr(vision, "patch_size", None)),
        dtype="float32" if stored == "float32" and hidden < 512 else "bfloat16",
        hidden=hidden,
        length=min(2048, getattr(text, "max_position_embeddings", None) or 2048),
        template=usual_template_name(processor),
        places=(family := FAMILIES.get(str(config.model_type))) is not None and family.places,
    )


def look_into(path: str, images: str | None) -> int:
    """The number of records, after reading the first ones.

    Raises:
        ConfigError: when none of them can be used, with the first reason, or an image is not where it should be.
    """
    from data import formats
    from data.formats.common import RecordSource
    from data.records import image_root, open_records
    from data.sample import Reject

    source = SourceConfig(path=path, images=images)
    records = open_records(source, None)
    where = RecordSource(source.label, source.format, image_root(source), source.columns)
    reasons, samples = [], []
    for place in range(min(LOOKED_AT, len(records))):
        try:
            samples.append(formats.parse_record(records[place], where, place))
        except Reject as error:
            reasons.append(str(error))
    if not samples:
        raise ConfigError(f"{path}: none of its first records can be used ({reasons[0] if reasons else 'it is empty'})")
    for media in islice((media for sample in samples for media in sample.media), LOOKED_AT):
        if isinstance(media.source, str) and not Path(where.root, media.source).exists():
            raise ConfigError(f"{path} names an image that does not exist, {media.source}; set its root with --images")
    return len(records)


def plan_steps(records: int) -> tuple[int, int, int]:
    """``(global batch size, epochs, steps)`` for a number of records: LLaVA's batch of 128 where that makes enough steps."""
    fitting = 2 ** int(math.log2(max(records // STEPS, 1)))
    batch = max(SMALLEST_BATCH, min(BATCH, fitting))
    steps = -(-records // batch)
    epochs = min(EPOCHS, max(1, -(-STEPS // steps)))
    return batch, epochs, steps * epochs


def render_config(arguments: argparse.Namespace, model: Model, records: int, budget: ZipConfig) -> str:
    """The YAML. Strings are quoted as JSON, which YAML reads."""
    batch, epochs, steps = plan_steps(records)
    rate = next(rate for least, rate in LEARNING_RATES if model.hidden >= least)
    share = (
        " (a share of an image's tokens)" if isinstance(budget.dominant, float) else ", CLS included if there is one"
    )
    every = max(1, steps // 10)

    def source(path: str) -> str:
        lines = [f"    - path: {json.dumps(path)}"]
        return "\n".join(lines + [f"      images: {json.dumps(arguments.images)}"] * bool(arguments.images))

    held_out = (
        f"eval:                            # asked of full tokens, of training-free compression and of the fine-tuned model\n"
        f"  sources:\n{source(arguments.eval)}\n"
        if arguments.eval
        else "# eval:                          # held-out questions: accuracy before and after, and a report\n"
        "#   sources:\n#     - path: held-out.json\n"
    )
    trust = "  trust_remote_code: true\n" if arguments.trust_remote_code else ""
    places = (
        "  # positions: original         # kept tokens keep the positions of the full prompt: more accurate with every selector that\n"
        "                               # was measured (docs/results.md); not for vLLM, ONNX and LLaVA's own loader\n"
        if model.places
        else ""
    )
    output = arguments.output_dir or f"runs/{arguments.out.stem}"
    return f"""# {count_of(records, "record")} for {arguments.model}. Every key: visionzip train --help
#
#   visionzip data --config {arguments.out}         what would be used and rejected
#   visionzip plan --config {arguments.out}         whether it fits into memory
#   visionzip train --config {arguments.out}        one process; several GPUs: deepspeed train.py --config {arguments.out}
output_dir: {json.dumps(output)}
seed: 0

model:
  path: {json.dumps(arguments.model)}
  dtype: {model.dtype}                # of the frozen weights
{trust}
zip:
  dominant: {budget.dominant}                   # tokens kept as they are{share}
  contextual: {budget.contextual}                 # tokens that the rest is merged into
{places}
data:
  sources:
{source(arguments.data)}
  template: {model.template}                 # {"the processor's own" if model.template == "chat" else "LLaVA's: the processor has no chat template"}
  max_length: {model.length}               # tokens of a sample, visual ones included

{held_out}
trainer:
  deepspeed: zero2
  learning_rate: {rate}          # for the projector before an LLM of hidden size {model.hidden}
  lr_scheduler_type: cosine
  warmup_steps: 0.03             # a share of all steps
  weight_decay: 0.0
  num_train_epochs: {epochs}            # {steps:,} steps
  global_batch_size: {batch}          # over all processes; accumulation follows
  per_device_train_batch_size: {min(batch, 16)}
  logging_steps: {max(1, steps // 100)}
  save_steps: {every}
  save_total_limit: 2
"""
