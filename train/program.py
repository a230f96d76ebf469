"""One run, step by step: data, trainer, base evaluation, training, final evaluation, what is left on disk."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.cache.reader import CachedPictures
from data.dataset import build_dataset
from data.lengths import Lengths
from data.rejects import RejectLog, TooManyRejected
from data.stream import build_stream, is_streamed
from train import packing, report
from train.batches import ShareOfBatches
from train.cached import check_cache, read_from_cache
from train.callbacks import Bar, Metrics, Speed, Wandb
from train.cli import digest
from train.compiled import compile_parts
from train.config import ConfigError, RunConfig
from train.ending import Exit, RunEnded, StopRequest, Watchdog
from train.evaluate import Scores, questions_of, score, table, tokens_a_picture, won_back
from train.grouped import LikeLengths
from train.outcome import export, write_report
from train.prefix import Prefix, common_beginning
from train.resume import Resume, agree, find_resume
from train.teacher import WithAnswers, check_teacher, described
from train.trainable import count
from train.trainer import Hooks, ProjectorTrainer
from train.wandb_page import Look, end_of_run
from visionzip import attach, attached, detach
from visionzip.projector import fingerprint

logger = logging.getLogger(__name__)


class Program:
    """What the pieces of a run share."""

    def __init__(
        self,
        config: RunConfig,
        args: Any,
        model: Any,
        processor: Any,
        trains: list[str],
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.args, self.model, self.processor = config, args, model, processor
        self.trains, self.stop, self.watchdog = trains, stop, watchdog
        self.rank, self.world_size = args.process_index, args.world_size
        self.folder = Path(config.output_dir)
        self.scores: dict[str, Scores] = {}
        self.tokens, self.of_tokens = 0, 0
        self.reject_log: RejectLog | None = None

    def run(self) -> int:
        try:
            dataset = self.dataset()
        except (ValueError, OSError) as error:
            raise ConfigError(f"data: {error}") from error
        if self.config.eval is not None:
            try:
                if self.config.eval.cache is not None:
                    check_cache(self.config, self.model, self.processor, self.config.eval.cache)
                self.tokens, self.of_tokens = tokens_a_picture(self.model, self.processor, self.config)
            except (ValueError, OSError) as error:
                raise ConfigError(f"eval: {error}") from error
        trainer = self.trainer(dataset)
        self.announce(trainer, dataset)
        try:
            trainer.train_or_resume()
        except BaseException:
            if self.wandb:
                self.wandb.finish(exit_code=1)
            raise
        if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
            return self.stopped(trainer)
        self.finish(trainer)
        return Exit.DONE

    # Build

    def dataset(self) -> Any:
        data, distill, pictures = self.config.data, self.config.train.distill, None
        if data.cache is not None:
            check_cache(self.config, self.model, self.processor, data.cache)
            read_from_cache(self.model)
            pictures = CachedPictures(data.cache, data.frames)
        elif self.config.zip.adaptive is not None:
            read_from_cache(self.model)  # `short_prompts` makes of pixels what a cache holds
        if not is_streamed(data):
            dataset = build_dataset(data, self.processor, self.config.seed, pictures)
            if distill is not None:
                wanted = described(self.model, self.processor, self.config)
                return dataset.making(WithAnswers(dataset.encoder, check_teacher(distill.cache, wanted)))
            return dataset
        if distill is not None:
            raise ValueError(
                "a streamed source has no records that a teacher could be asked beforehand; drop train.distill"
            )
        if self.args.max_steps <= 0:
            raise ValueError("a streamed source has no end; set trainer.max_steps")
        return build_stream(data, self.processor, self.config.seed, self.rank, self.world_size, pictures)

    def batches(self, dataset: Any) -> Any:
        """This process's share of the samples, or None for a stream, which knows its own."""
        if is_streamed(self.config.data):
            return None
        args, batch = self.args, self.args.per_device_train_batch_size
        order = dataset.sampler(batch * self.world_size * args.gradient_accumulation_steps)
        if self.config.data.batching == "random":
            return ShareOfBatches(order, self.rank, self.world_size, batch)
        attachment = attached(self.model)
        assert attachment is not None
        budget = sum(attachment.family.budget(attachment.config))
        lengths, packed = Lengths(dataset, self.tokens or budget), self.packed() is not None
        return LikeLengths(order, self.rank, self.world_size, batch, args.gradient_accumulation_steps, lengths, packed)

    def llm(self) -> Any:
        return self.model.get_submodule(attached(self.model).family.llm)  # type: ignore[union-attr]

    def packed(self) -> Any:
        """The LLM, where a micro-batch is laid out as one row without padding."""
        llm = self.llm()
        if self.args.gradient_checkpointing or self.args.activation_checkpointing:
            return None  # what is computed again in the backward would see another attention
        return llm if self.config.data.batching == "packed" and packing.possible(self.model, llm) else None

    def prefix(self, dataset: Any) -> Prefix | None:
        if not self.config.train.share_prefix or is_streamed(self.config.data):
            return None
        items = [item for index in range(min(len(dataset), 64)) if isinstance(item := dataset[index], dict)]
        rows = [(item["input_ids"], item["labels"]) for item in items]
        if not rows:
            return None
        family = attached(self.model).family  # type: ignore[union-attr]
        beginning = common_beginning(rows, family.image_token_id)
        prefix = Prefix(self.model, family.llm, beginning)
        return prefix if prefix.possible else None

    def distilled(self) -> dict[str, float]:
        """How the teacher's answers go into the loss."""
        distill = self.config.train.distill
        return {"weight": distill.weight, "temperature": distill.temperature} if distill is not None else {}

    def trainer(self, dataset: Any) -> ProjectorTrainer:
        args = self.args
        together = args.per_device_train_batch_size * self.world_size
        identity = {
            "base": {part: digest(values) for part, values in fingerprint(self.model).items()},
            "zip": self.config.zip.model_dump(),
            "trains": digest([(name, list(shape)) for name, shape in self.shapes()]),
        }
        exact = {
            "data": digest([self.config.data.model_dump(), size_of(dataset), *self.distilled().items()]),
            "seed": self.config.seed,
            "global_batch": together * args.gradient_accumulation_steps,
            "zero": self.config.trainer.deepspeed,
        }
        resume = find_resume(self.config.trainer.resume, str(self.folder), self.rank, self.world_size, self.say)
        if resume is not None:
            self.tell_resume(resume, agree(resume, identity, {**exact, "world_size": self.world_size}))
        self.wandb = self.make_wandb(identity)
        if self.rank == 0:
            self.reject_log = RejectLog(
                self.folder / "rejected.jsonl",
                self.config.data.max_rejected,
                size_of(dataset),
                resume=resume is not None,
            )
            if resume is not None:
                self.reject_log.read(resume.progress["step"] * exact["global_batch"])
        hooks = Hooks(
            records=self.records,
            before_training=self.evaluate_base,
            extra_logs=Speed(self.tokens, self.of_tokens),
            identity={**identity, **exact},
        )
        chosen = self.config.trainer
        if chosen.torch_compile:
            compile_parts(self.llm(), chosen.torch_compile_backend, chosen.torch_compile_mode)
        timeout = self.config.trainer.data_timeout or self.config.trainer.hang_timeout
        return ProjectorTrainer(
            model=self.model,
            args=args,
            train_dataset=dataset,
            collator=dataset.collator(),
            batches=self.batches(dataset),
            prefix=self.prefix(dataset),
            masked=not attached(self.model).family.plain_positions,  # type: ignore[union-attr]
            packed=self.packed(),
            distill=self.distilled(),
            stop=self.stop,
            watchdog=self.watchdog,
            hooks=hooks,
            resume=resume,
            data_timeout=timeout,
            callbacks=[Bar(), Metrics(self.folder / "metrics.jsonl"), *self.wandb_callbacks()],
        )

    def wandb_callbacks(self) -> list[Any]:
        """W&B, and what it is shown of the held-out questions while the model learns."""
        if not self.wandb:
            return []
        report, held_out = self.config.report, self.config.eval
        if held_out is None or not report.enabled or self.config.trainer.sharded:
            return [self.wandb]
        look = Look(
            self.wandb.log_made, lambda: questions_of(self.config, self.processor), self.processor, held_out,
            report.pictures, report.look_every,
        )  # fmt: skip
        return [self.wandb, look]

    def shapes(self) -> list[tuple[str, Any]]:
        from train.state import shape_of

        named = dict(self.model.named_parameters())
        return [(name, shape_of(named[name])) for name in self.trains]

    def make_wandb(self, identity: dict[str, Any]) -> Wandb | None:
        if not self.config.wandb.enabled or self.rank != 0:
            return None
        facts = {
            "world_size": self.world_size,
            "trainable_parameters": count(self.model),
            "tokens_per_picture": self.tokens,
            "tokens_per_picture_before": self.of_tokens,
        }
        try:
            return Wandb(self.config, self.config.model_dump(mode="json"), facts)
        except Exception as error:
            self.say(f"W&B is not available ({error}); metrics.jsonl has everything")
            return None

    # Tell

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def announce(self, trainer: ProjectorTrainer, dataset: Any) -> None:
        args = self.args
        trainable, total = count(self.model), count(self.model, trainable=False)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.world_size
        self.say(
            f"training {trainable:,} of {total:,} parameters ({', '.join(self.parts())})\n"
            f"{self.world_size} process{'es' if self.world_size > 1 else ''} x {args.per_device_train_batch_size} samples "
            f"x {args.gradient_accumulation_steps} accumulated = {batch} a step; {size_of(dataset) or 'streamed'} samples; "
            f"{self.config.trainer.deepspeed}; {self.config.model.dtype} on {args.device.type}"
        )
        if self.of_tokens:
            self.say(f"{self.tokens} of {self.of_tokens} visual tokens a picture")
        self.say("; ".join(in_force(trainer.fast, self.config.trainer.torch_compile)))

    def parts(self) -> list[str]:
        section = self.config.train
        return [*section.parts, *(f"LoRA on {part}" for part in (section.lora.on if section.lora else []))]

    def tell_resume(self, resume: Resume, inexact: list[str]) -> None:
        self.say(f"resuming from {resume.path} (step {resume.progress['step']} of {resume.progress['max_steps']})")
        if 0 < self.args.max_steps < resume.progress["step"]:
            self.say(
                f"  trainer.max_steps={self.args.max_steps} is behind it: nothing is trained, its projector is what is exported"
            )
        for line in inexact:
            self.say(f"  not bit for bit the interrupted run: {line}")

    def records(self, rejected: list[dict[str, Any]], read: int) -> None:
        """Rank 0 counts what was read and lists what was not used.

        Raises:
            RunEnded: when too much of the data is bad.
        """
        assert self.reject_log is not None
        self.reject_log.read(read)
        try:
            new = self.reject_log.add(rejected)
        except TooManyRejected as error:
            raise RunEnded(Exit.DATA, str(error)) from error
        for row in new[:3]:
            self.say(f"not used: {row['source']} {row['id']}: {row['reason']} ({row['detail']})")

    # Evaluate

    def evaluate_base(self, trainer: ProjectorTrainer) -> None:
        """Full tokens and training-free, with the base model whole in memory; once for a run and all its resumes."""
        if self.config.eval is None:
            return
        known = self.folder / "base_scores.json"
        key = digest([self.config.eval.model_dump(), self.config.data.template, self.config.model.model_dump(),
                      self.config.zip.model_dump(), trainer.hooks.identity["base"]])  # fmt: skip
        stored: list[Any] = [read_scores(known, key) if self.rank == 0 else None]
        if self.world_size > 1:
            dist.broadcast_object_list(stored, src=0)
        if stored[0] is not None:
            self.scores.update(stored[0])
            return
        model = trainer.plain
        if "training_free" in self.config.eval.compare:
            self.scores["training_free"] = self.score(model, "training-free")
        if "full" in self.config.eval.compare:
            detach(model)
            self.scores["full"] = self.score(model, "full tokens")
            attach(model, self.processor, self.config.zip)
        if self.rank == 0:
            known.write_text(json.dumps({"key": key, "scores": {n: asdict(s) for n, s in self.scores.items()}}))

    def score(self, model: Any, what: str) -> Scores:
        from tqdm import tqdm

        bars: list[tqdm] = []

        def show(done: int, of: int) -> None:
            if not bars:
                bars.append(tqdm(total=of, desc=f"asking ({what})", unit="batch", disable=self.rank != 0, file=sys.stderr,
                                 dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 5.0))  # fmt: skip
            bars[0].update(done - bars[0].n)

        result = score(
            model,
            self.processor,
            self.config,
            rank=self.rank,
            world_size=self.world_size,
            beat=self.watchdog.beat,
            bar=show,
        )
        for bar in bars:
            bar.close()
        if result.unread:
            self.say(f"{result.unread} held-out questions could not be read and do not count")
        return result

    # End

    def stopped(self, trainer: ProjectorTrainer) -> int:
        if self.wandb:
            self.wandb.finish()
        raise RunEnded(
            Exit.STOPPED,
            f"stopped by {self.stop.signal or 'a signal to another rank'} at step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}, which is saved. Start the same command again to go on",
        )

    def finish(self, trainer: ProjectorTrainer) -> None:
        log = self.reject_log
        if log is not None and log.rejected:
            self.say(f"{log.rejected} records were not used ({log.summary()}); see {log.path}")
        if self.config.eval is not None:
            self.scores["fine_tuned"] = self.score(trainer.plain, "fine-tuned")
        facts = report.results(self.scores, self.tokens, self.of_tokens, self.config.seed, count(self.model))
        metadata = {
            "results": {key: value for key, value in facts.items() if key != "by_type"},
            "data": [source.label for source in self.config.data.sources],
            "steps": trainer.state.global_step,
            "trained": self.parts(),
        }
        self.watchdog.beat("writing the results")
        export(trainer.plain, self.processor, self.config, metadata, write=self.rank == 0)
        if self.rank == 0:
            history = trainer.state.log_history
            pictures = write_report(trainer.plain, self.processor, self.config, self.scores, facts, history)
            self.show(pictures)
        if self.world_size > 1:
            dist.barrier()

    def show(self, pictures: list[Path]) -> None:
        if self.scores:
            print(f"\n{table(self.scores, self.tokens, self.of_tokens)}\n\n{won_back(self.scores)}", flush=True)
        where = f"; report: {self.folder / 'report'}" if pictures else ""
        self.say(f"projector: {self.folder / 'projector'}{where}")
        if self.wandb:
            self.wandb.log({f"eval/{name}": scores.accuracy for name, scores in self.scores.items()})
            self.wandb.log_made(lambda wandb: end_of_run(wandb, self.scores, self.tokens, self.of_tokens))
            self.wandb.log_pictures({f"report/{path.stem}": path for path in pictures})
            self.wandb.finish()


def size_of(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def read_scores(path: Path, key: str) -> dict[str, Scores] | None:
    try:
        stored = json.loads(path.read_text())
        if stored["key"] != key:
            return None
        return {
            name: Scores({k: (v[0], v[1]) for k, v in s["types"].items()}, s["answers"], s["unread"])
            for name, s in stored["scores"].items()
        }
    except (OSError, ValueError, KeyError):
        return None


def in_force(fast: dict[str, Any], compiled: bool) -> list[str]:
    """What is done without its being visible in the loss, in words: a run that had to do without says so, too."""
    prefix = fast["prefix"]
    said = ["samples packed into rows without padding" if fast["packed"] is not None else "padded batches"]
    if prefix is not None:
        said.append(f"the first {len(prefix.beginning)} tokens computed once")
    if compiled:
        said.append("norms and MLPs compiled")
    return said
