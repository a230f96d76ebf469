"""One training run of one trainer, with a probe in it. Started by `peers.py` with the Python of that trainer's environment:

    python -m scripts.benchmarks.peer_run trl|llama-factory|ms-swift|ours SPEC.json

The probe is the same for all: a callback of transformers' Trainer, which all of them build on. It times the steps, keeps the losses,
counts the tokens that go through the LLM's first layer, and writes `probe.json` into the run's folder at the end.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def make_probe(folder: Path, profile: bool = False) -> Any:
    """`profile`: also the seconds of each operator in the last step (`operators`)."""
    import torch
    from transformers import TrainerCallback

    class Probe(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.tokens, self.trained, self.last = 0, 0, 0.0
            self.profiler = torch.profiler.profile() if profile else None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            (layers,) = [
                m.layers for n, m in model.named_modules() if n.endswith("language_model") and hasattr(m, "layers")
            ]
            layers[0].mlp.register_forward_hook(self.count)
            self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.last = time.perf_counter()

        def count(self, module: Any, inputs: Any, output: Any) -> None:
            self.tokens += output.shape[:-1].numel()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.profiler is not None and state.global_step == state.max_steps - 1:
                self.profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if self.profiler is not None and state.global_step == state.max_steps:
                self.profiler.stop()
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found = summarize(self.seconds, self.losses, self.tokens) | {
                "trained": self.trained,
                "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory(),
            }
            if self.profiler is not None:
                events = self.profiler.key_averages()
                found["operators"] = {event.key: event.self_cpu_time_total / 1e6 for event in events}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "probe.json").write_text(json.dumps(found))

    return Probe()


def summarize(seconds: list[float], losses: list[float], tokens: int) -> dict[str, Any]:
    """A run of `len(seconds)` steps: the median without the first step, which also starts allocators and kernels and compiles."""
    return {
        "seconds": statistics.median(seconds[1:] or seconds),
        "seconds_all": seconds,
        "first_loss": losses[0],
        "tokens_per_step": tokens / len(seconds),
    }


def peak_memory() -> int:
    """Bytes of this process at its peak. Linux's own count for this program: `ru_maxrss` has what the parent held when it forked."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def run_trl(spec: dict[str, Any]) -> None:
    """TRL's SFTTrainer as `examples/trl_sft.py` sets it up, compressed where there is a `spec["zip"]`."""
    import torch

    from examples.trl_sft import build_trainer, read_examples
    from visionzip import ZipConfig

    trainer = build_trainer(
        spec["model"], read_examples(Path(spec["records"]) / "ours.json", spec["records"]),
        None if spec["zip"] is None else ZipConfig(**spec["zip"]), spec["dtype"], [make_probe(Path(spec["out"]))],
        output_dir=spec["out"], per_device_train_batch_size=spec["batch"], gradient_accumulation_steps=1, max_steps=spec["steps"],
        learning_rate=spec["rate"], logging_steps=1, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False, lr_scheduler_type="constant", weight_decay=0.0, bf16=spec["dtype"] == "bfloat16",
        disable_tqdm=True,
    )  # fmt: skip
    trainer.train()


def run_llama_factory(spec: dict[str, Any]) -> None:
    """LLaMA-Factory's full fine-tuning with the LLM and the encoder frozen."""
    import torch
    from llamafactory.train.tuner import run_exp

    half = spec["dtype"] == "bfloat16"
    arguments = {
        "stage": "sft", "do_train": True, "model_name_or_path": spec["model"], "finetuning_type": "full", "template": "llava",
        "freeze_language_model": True, "freeze_vision_tower": True, "freeze_multi_modal_projector": False,
        "dataset_dir": spec["records"], "dataset": "records", "cutoff_len": 4096, "image_max_pixels": 1 << 24,
        "output_dir": spec["out"], "overwrite_output_dir": True, "per_device_train_batch_size": spec["batch"],
        "gradient_accumulation_steps": 1, "max_steps": spec["steps"], "learning_rate": spec["rate"], "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": not torch.cuda.is_available(), "lr_scheduler_type": "constant",
        "bf16": half, "disable_gradient_checkpointing": True, "flash_attn": "sdpa", "overwrite_cache": True,
        "infer_dtype": spec["dtype"], "preprocessing_num_workers": 1, "dataloader_num_workers": 0, "trust_remote_code": False,
    }  # fmt: skip
    run_exp(arguments, callbacks=[make_probe(Path(spec["out"]))])


def run_swift(spec: dict[str, Any]) -> None:
    """ms-swift's full fine-tuning with the LLM and the encoder frozen, on a template that writes LLaVA's conversation as the others do."""
    import torch
    from swift.arguments import SftArguments
    from swift.pipelines.train.sft import SwiftSft
    from swift.template import TemplateMeta, register_template
    from swift.template.templates.llava import LlavaHfTemplate

    class Probed(SwiftSft):
        def train(self, trainer: Any) -> Any:
            trainer.add_callback(make_probe(Path(spec["out"])))
            return super().train(trainer)

    register_template(
        TemplateMeta(
            "llava_v1", prefix=["{{SYSTEM}} "], prompt=["USER: {{QUERY}} ASSISTANT:"],
            chat_sep=["</s>"], suffix=["</s>"], default_system=spec["system"], template_cls=LlavaHfTemplate,
        )
    )  # fmt: skip
    arguments = SftArguments(
        model=spec["model"], model_type="llava1_5_hf", template="llava_v1", tuner_type="full", freeze_llm=True, freeze_vit=True,
        freeze_aligner=False, dataset=[str(Path(spec["records"]) / "swift.jsonl")], split_dataset_ratio=0.0, max_length=4096,
        torch_dtype=spec["dtype"], attn_impl="sdpa", output_dir=spec["out"], add_version=False, save_strategy="no",
        report_to=["none"], max_steps=spec["steps"], per_device_train_batch_size=spec["batch"], gradient_accumulation_steps=1,
        learning_rate=spec["rate"], lr_scheduler_type="constant", weight_decay=0.0, warmup_ratio=0.0, logging_steps=1,
        gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), bf16=spec["dtype"] == "bfloat16",
        dataloader_num_workers=0, dataset_num_proc=1, check_model=False,
    )  # fmt: skip
    Probed(arguments).main()


def run_ours(spec: dict[str, Any]) -> None:
    """`train.run` on a config, as `train.py` starts it, with the probe in place of the progress bar."""
    import train.run
    from train.config import load_config

    probe = make_probe(Path(spec["out"]), spec.get("profile", False))
    train.run.ProgressBar = lambda: probe  # type: ignore[misc,assignment]
    if code := train.run.run(load_config(spec["config"])):
        raise SystemExit(code)


TRAINERS = {"trl": run_trl, "llama-factory": run_llama_factory, "ms-swift": run_swift, "ours": run_ours}


def main() -> None:
    kind, path = sys.argv[1:]
    spec = json.loads(Path(path).read_text())
    if spec["threads"]:
        import torch

        torch.set_num_threads(spec["threads"])
    TRAINERS[kind](spec)


if __name__ == "__main__":
    main()
