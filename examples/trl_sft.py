"""Fine-tune the projector of a compressed LLaVA with TRL's SFTTrainer.

pip install trl visionzip-ft
python examples/trl_sft.py MODEL records.json IMAGES OUT      # LLaVA's JSON and the folder of its images; OUT gets the projector
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from visionzip import ZipConfig, attach
from visionzip.export import save_projector


def read_examples(records, images):
    """LLaVA's records as prompts and completions, one example a question; TRL writes the image into the first question itself."""
    examples = []
    for record in json.loads(Path(records).read_text()):
        turns = [
            {"role": ("user", "assistant")[number % 2], "content": turn["value"].replace("<image>", "").strip()}
            for number, turn in enumerate(record["conversations"])
        ]
        for answer in range(1, len(turns), 2):
            image = Image.open(Path(images) / record["image"]).convert("RGB")
            examples.append({"prompt": turns[:answer], "completion": [turns[answer]], "images": [image]})
    return Dataset.from_list(examples)


def build_trainer(path, examples, budget, dtype="float32", callbacks=(), **options):
    """A trainer of the projector. `budget`: a ZipConfig, or None for the uncompressed model; `options`: of SFTConfig."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    processor = AutoProcessor.from_pretrained(path)
    if budget is not None:
        attach(model, processor, budget)  # before the trainer: its collator asks the processor for placeholders
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    options = SFTConfig(max_length=None, **options)  # the default cuts at 1,024 tokens, placeholders included
    return SFTTrainer(model, options, train_dataset=examples, processing_class=processor, callbacks=list(callbacks))


if __name__ == "__main__":
    path, records, images, out = sys.argv[1:]
    budget = ZipConfig(dominant=54, contextual=10)
    trainer = build_trainer(
        path, read_examples(records, images), budget, output_dir=f"{out}/trl", learning_rate=2e-5, num_train_epochs=1
    )
    trainer.train()
    print(save_projector(trainer.accelerator.unwrap_model(trainer.model), out))
