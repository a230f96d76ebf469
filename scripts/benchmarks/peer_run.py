"""One training run of one trainer, measured. Started by `peers.py` with the Python of that trainer's environment.

    python peer_run.py trl|llama-factory|ours SPEC.json

The same probe for all of them: a callback of transformers' Trainer that times the steps, keeps the losses, and counts the tokens that
go into the LLM's first layer. It writes `probe.json` into the run's folder.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def make_probe(folder: Path) -> Any:
    from transformers import TrainerCallback

    class Probe(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.tokens, self.hook, self.last = 0, None, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            (layers,) = [
                m.layers for n, m in model.named_modules() if n.endswith("language_model") and hasattr(m, "layers")
            ]
            self.hook = layers[0].mlp.register_forward_hook(self.count)
            self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.last = time.perf_counter()

        def count(self, module: Any, inputs: Any, output: Any) -> None:
            self.tokens += output.shape[:-1].numel()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            later = self.seconds[1:] or self.seconds  # the first step also starts workers, allocators and kernels
            found = {
                "seconds": statistics.median(later), "seconds_all": self.seconds, "losses": self.losses,
                "tokens_per_step": self.tokens / max(len(self.seconds), 1), "trained": self.trained,
            }  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "probe.json").write_text(json.dumps(found))

    return Probe()


def trl(spec: dict[str, Any]) -> None:
    """TRL's SFTTrainer on prompts and completions. With `spec["zip"]` the model is compressed by `visionzip.attach` first."""
    import torch
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    rows = json.loads(Path(spec["trl"]).read_text())
    for row in rows:
        row["images"] = [Image.open(path).convert("RGB") for path in row["images"]]
    model = AutoModelForImageTextToText.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation="sdpa")
    processor = AutoProcessor.from_pretrained(spec["model"])
    if spec["zip"] is not None:
        from visionzip import ZipConfig, attach

        attach(model, processor, ZipConfig(**spec["zip"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name)
    options = SFTConfig(
        output_dir=spec["out"], per_device_train_batch_size=spec["batch"], gradient_accumulation_steps=1, max_steps=spec["steps"],
        learning_rate=spec["rate"], logging_steps=1, logging_strategy="steps", save_strategy="no", report_to="none", use_cpu=True,
        gradient_checkpointing=False, max_length=None, seed=0, warmup_steps=0, lr_scheduler_type="constant", weight_decay=0.0,
        bf16=False, completion_only_loss=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=options, train_dataset=Dataset.from_list(rows), processing_class=processor,
        callbacks=[make_probe(Path(spec["out"]))],
    )  # fmt: skip
    trainer.train()


def llama_factory(spec: dict[str, Any]) -> None:
    """LLaMA-Factory's full fine-tuning with the LLM and the encoder frozen."""
    from llamafactory.train.tuner import run_exp

    arguments = {
        "stage": "sft", "do_train": True, "model_name_or_path": spec["model"], "finetuning_type": "full", "template": "llava",
        "freeze_language_model": True, "freeze_vision_tower": True, "freeze_multi_modal_projector": False,
        "dataset_dir": spec["llama_factory"], "dataset": "records", "cutoff_len": 4096, "image_max_pixels": 1 << 24,
        "output_dir": spec["out"], "overwrite_output_dir": True, "per_device_train_batch_size": spec["batch"],
        "gradient_accumulation_steps": 1, "max_steps": spec["steps"], "learning_rate": spec["rate"], "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 0, "lr_scheduler_type": "constant", "bf16": False,
        "disable_gradient_checkpointing": True, "flash_attn": "sdpa", "overwrite_cache": True, "infer_dtype": "float32",
        "preprocessing_num_workers": 1, "dataloader_num_workers": 0, "trust_remote_code": False,
    }  # fmt: skip
    run_exp(arguments, callbacks=[make_probe(Path(spec["out"]))])


def ours(spec: dict[str, Any]) -> None:
    """`train.run` on a config, as `train.py` starts it."""
    import train.run
    from train.config import load_config

    probe = make_probe(Path(spec["out"]))
    train.run.Bar = lambda: probe  # type: ignore[misc,assignment]  # a callback in place of the progress bar
    if code := train.run.run(load_config(spec["config"])):
        raise SystemExit(code)


def main() -> None:
    kind, path = sys.argv[1:]
    spec = json.loads(Path(path).read_text())
    if spec["threads"]:
        import torch

        torch.set_num_threads(spec["threads"])
    {"trl": trl, "llama-factory": llama_factory, "ours": ours}[kind](spec)


if __name__ == "__main__":
    main()
