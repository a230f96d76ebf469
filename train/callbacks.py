"""What a run reports while it trains: a progress bar, `metrics.jsonl`, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import logging
import netrc
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from transformers import TrainerCallback
from transformers.integrations import WandbCallback

from train.config import RunConfig, to_yaml
from train.wandb_files import read_logged_steps

logger = logging.getLogger(__name__)
FINISH_TIMEOUT = 60.0  # seconds


class ProgressBar(TrainerCallback):
    """Loss, samples/s and time left, on rank 0 alone."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        if state.is_world_process_zero:
            shown = sys.stderr.isatty()
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True,
                mininterval=0.2 if shown else 5.0, file=sys.stderr,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.4f}, {logs.get('samples_per_second', 0):.1f} samples/s", refresh=False
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Speed:
    """Counts of a log interval → rates. Used by the trainer's `log`."""

    def __init__(self, tokens: int, of_tokens: int) -> None:
        self.tokens, self.of_tokens = tokens, of_tokens
        self.since = time.perf_counter()

    def __call__(self, totals: Any) -> dict[str, float]:
        seconds, self.since = max(time.perf_counter() - self.since, 1e-9), time.perf_counter()
        return {
            "samples_per_second": totals.samples / seconds,
            "tokens_per_second": totals.tokens / seconds,
            "images_per_second": totals.images / seconds,
            "supervised_tokens": totals.supervised,
            "tokens_per_image": self.tokens,
            "tokens_per_image_before": self.of_tokens,
        }


class Metrics(TrainerCallback):
    """Every log line as one JSON object in `metrics.jsonl`, each step once also when a run was killed and resumed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step < state.max_steps:
            keep = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            replace_text(self.path, "".join(json.dumps(line) + "\n" for line in keep))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **{k: to_number(v) for k, v in logs.items()}}) + "\n")


class RecordConfig(TrainerCallback):
    """The config in `config.yaml`, once training starts with it: what was refused, or had nothing left to train, is not recorded."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.path = config, Path(config.output_dir) / "config.yaml"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and (state.global_step < state.max_steps or not self.path.is_file()):
            replace_text(self.path, to_yaml(self.config))


def replace_text(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that a kill leaves the old content or the new."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`, each with its `step`; one that a kill cut off, or that is damaged, is left out."""
    lines = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict) and isinstance(values.get("step"), int):
                    lines.append(values)
    return lines


def to_number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


class Wandb(WandbCallback):
    """The Trainer's W&B callback with this run's id, config and directory. A failure of W&B never ends the training."""

    def __init__(self, config: RunConfig, resolved: dict[str, Any], facts: dict[str, Any]) -> None:
        super().__init__()
        self.run_config, self.resolved, self.facts = config, resolved, facts
        self.id_file = Path(config.output_dir) / "wandb.id"
        self.logged: set[int] = set()

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._wandb.run is None:
            self._safely(lambda: self._start(choose_mode(self.run_config)), "could not be started")
            self._safely(lambda: self._log_what_is_missing(state.global_step), "failed to log")
        self._initialized = True

    def _start(self, mode: str) -> None:
        section = self.run_config.wandb
        settings = self._wandb.Settings(init_timeout=30, silent=True, console="off", x_disable_stats=True)
        run_id = self._run_id()
        self.logged = read_logged_steps(self.run_config.output_dir, run_id)
        common = {
            "project": os.environ.get("WANDB_PROJECT", section.project),
            "name": section.name or Path(self.run_config.output_dir).name,
            "group": section.group,
            "tags": section.tags,
            "id": run_id,
            "resume": "allow",
            "dir": self.run_config.output_dir,
            "config": {**self.resolved, **self.facts},
            "settings": settings,
        }
        try:
            self._wandb.init(mode=mode, **common)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("W&B can't be reached (%s); logging offline, upload later with `wandb sync`", error)
            self._wandb.init(mode="offline", **common)
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step", step_sync=True)

    def _log_what_is_missing(self, step: int) -> None:
        """W&B writes its files in blocks; what a kill took from them, up to the checkpoint, `metrics.jsonl` still has."""
        run = self._wandb.run
        if run is not None and run.resumed:  # online: the server says how far it got
            self.logged |= set(range(int(run.summary.get("train/global_step", 0)) + 1))
        for line in read_metrics(Path(self.run_config.output_dir) / "metrics.jsonl"):
            if "loss" in line and line["step"] <= step and line["step"] not in self.logged:
                values = {f"train/{name}": value for name, value in line.items() if name != "step"}
                self._wandb.log({**values, "train/global_step": line["step"]})

    def _run_id(self) -> str:
        """The same id for every start of this run; another one where it starts from the beginning, or its steps would count as logged before."""
        anew = self.run_config.trainer.resume is None
        if anew or not self.id_file.is_file() or not self.id_file.read_text().strip():
            self.id_file.parent.mkdir(parents=True, exist_ok=True)
            self.id_file.write_text(secrets.token_hex(4))
        return self.id_file.read_text().strip()

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        # A step that an earlier start of this run logged before it was killed is not logged again.
        if state.global_step in self.logged and logs and "loss" in logs:
            return
        self._safely(
            lambda: super(Wandb, self).on_log(args, state, control, model=model, logs=logs, **kwargs), "failed to log"
        )

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The program finishes the run itself, after the evaluation."""

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints are not uploaded."""

    def log(self, values: dict[str, Any]) -> None:
        """Figures, tables and scores at the end of a run."""
        if self._wandb is not None and self._wandb.run is not None:
            self._safely(lambda: self._wandb.log(values), "failed to log")

    def log_computed(self, make: Callable[[Any], dict[str, Any]]) -> None:
        """Log the values that `make(wandb)` returns, for those made of W&B's own types."""
        if self._wandb is not None and self._wandb.run is not None:
            self._safely(lambda: self._wandb.log(make(self._wandb)), "failed to log")

    def log_images(self, paths: dict[str, Path]) -> None:
        if self._wandb is not None and self._wandb.run is not None:
            self.log({name: self._wandb.Image(str(path)) for name, path in paths.items()})

    def finish(self, exit_code: int = 0) -> None:
        """Bounded: with the network gone W&B would go on trying; what it has not sent is on disk, for `wandb sync`."""
        if self._wandb is None or self._wandb.run is None:
            return
        ending = threading.Thread(
            target=lambda: self._safely(lambda: self._wandb.finish(exit_code=exit_code), "failed to finish"),
            daemon=True,
        )
        ending.start()
        ending.join(FINISH_TIMEOUT)
        if ending.is_alive():
            logger.warning("W&B is still uploading after %.0f s; `wandb sync` sends the rest", FINISH_TIMEOUT)

    def _safely(self, action: Callable[[], Any], what: str) -> None:
        if self._wandb is None:
            return
        try:
            action()
        except Exception as error:
            logger.warning("W&B %s (%s: %s); the run continues without it, metrics.jsonl has everything",
                           what, type(error).__name__, error)  # fmt: skip
            self._wandb = None  # type: ignore[assignment]


def choose_mode(config: RunConfig) -> str:
    """WANDB_MODE, then the config, then online where there is a key."""
    asked = os.environ.get("WANDB_MODE") or config.wandb.mode
    if asked != "auto":
        return {"dryrun": "offline", "run": "online"}.get(asked, asked)
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether there is a W&B key on this machine: WANDB_API_KEY, or `wandb login`'s entry in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
