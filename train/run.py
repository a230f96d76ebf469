"""One training run: build → train → evaluate → export."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from data.stream import is_streamed
from train.arguments import training_arguments
from train.build import build_model, master_precision
from train.callbacks import Metrics, ProgressBar, RecordConfig, Speed, Wandb
from train.checkpoint import list_checkpoints, step_of
from train.compiled import compile_parts, describe_compiled
from train.config import ConfigError, RunConfig
from train.elastic import describe_budgets
from train.ending import Exit, RunEnded, StopRequest, Watchdog
from train.evaluation import count_tokens, evaluate, evaluate_at_budgets, evaluate_base
from train.finished import find_finish
from train.held_out import load_questions
from train.identity import compare_identity, describe_identity
from train.launch import check_world, join_deepspeed, prepare_environment, silence_rank
from train.layout import PackedRow, choose_layout, find_prefix
from train.outcome import leave_behind
from train.output_dir import claim_output_dir
from train.result_checks import check_loss
from train.resume import Resume, find_resume
from train.scores import Scores
from train.setup import Run, Tokens, build_batches, build_data, note_rejected, open_rejects, size_of
from train.trainable import count_parameters, describe_trained, free_parameters
from train.trainer import Hooks, ProjectorTrainer
from train.wandb_page import ShowAnswers
from visionzip import attached
from visionzip.loading import RESULTS
from visionzip.words import count_of


def run(config: RunConfig) -> int:
    """From the base model to the report; returns the exit code.

    Raises:
        ConfigError, RunEnded: see `train.guard.run_guarded`.
    """
    stop = StopRequest().install()
    try:
        args = start_process(config)
        rank = args.process_index
        with claim_output_dir(Path(config.output_dir), rank):
            step = find_finish(config, rank, args.world_size)
            if step is not None:
                if rank == 0:
                    tell_finished(config, step)
                return Exit.DONE
            watchdog = Watchdog(config.trainer.hang_timeout, rank)
            built = build_run(config, args, stop, watchdog)
            watchdog.start()
            try:
                return train_and_leave_behind(built)
            finally:
                watchdog.stop()
    finally:
        stop.remove()


def train_and_leave_behind(run: Run) -> int:
    """Train, evaluate, export; returns the exit code."""
    dataset = build_data(run)
    tokens = count_tokens(run)
    identity = describe_identity(run, size_of(dataset))
    resume = find_start(run, identity)
    wandb = start_wandb(run, tokens)
    rejects = open_rejects(run, dataset, resume, identity["global_batch"]) if run.rank == 0 else None
    scores: dict[str, Scores] = {}
    hooks = Hooks(
        records=partial(note_rejected, run, rejects),
        before_training=lambda trainer: scores.update(evaluate_base(run, identity["base"])),
        extra_logs=Speed(*tokens),
        say=run.say,
        identity=identity,
    )
    trainer = build_trainer(run, dataset, tokens[0], hooks, resume, wandb)
    announce(run, trainer, dataset, tokens)
    try:
        trainer.train_or_resume()
    except BaseException:
        if wandb:
            wandb.finish(exit_code=1)
        raise
    if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
        end_early(run, trainer, wandb)
    if warning := check_loss(trainer.state.log_history):
        run.say(warning)
    if rejects is not None and rejects.rejected:
        run.say(f"{count_of(rejects.rejected, 'record')} not used ({rejects.summary()}); see {rejects.path}")
    if run.config.eval is not None:
        scores["fine_tuned"] = evaluate(run, "fine-tuned")
        scores |= evaluate_at_budgets(run)
    leave_behind(run, trainer, scores, tokens, wandb)
    return Exit.DONE


# Build


def start_process(config: RunConfig) -> Any:
    """Environment and process group → `TrainingArguments`."""
    launched = prepare_environment()
    silence_rank(int(os.environ["RANK"]))
    try:
        args = training_arguments(
            config.trainer,
            output_dir=config.output_dir,
            seed=config.seed,
            dtype=config.model.dtype,
            world_size=launched,
        )
    except ValueError as error:
        raise ConfigError(f"trainer: {error}") from error
    check_world(args.world_size, launched)
    if config.trainer.deepspeed != "off":
        join_deepspeed()
    return args


def build_run(config: RunConfig, args: Any, stop: StopRequest, watchdog: Watchdog) -> Run:
    """The compressed model with its trainable parts unfrozen, and what goes with it."""
    from transformers import set_seed

    model, processor = build_model(config)
    set_seed(config.seed)  # adapters are drawn before the Trainer seeds; loading draws too, but not under every stage
    try:
        trains = free_parameters(model, config.train)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.trainer.deepspeed == "off":
        master_precision(model)
    return Run(config, args, model, processor, trains, stop, watchdog)


def find_start(run: Run, identity: dict[str, Any]) -> Resume | None:
    """The checkpoint that the run resumes from, if there is one; logs it.

    Raises:
        RunEnded: it is of another run, or of settings that can't change.
    """
    resume = find_resume(run.config.trainer.resume, str(run.folder), run.rank, run.world_size, run.say)
    if resume is not None:
        inexact = compare_identity(resume, identity)
        run.say(f"resuming from {resume.path} (step {resume.progress['step']} of {resume.progress['max_steps']})")
        for line in inexact:
            run.say(f"  not bit for bit the interrupted run: {line}")
    start = resume.progress["step"] if resume is not None else 0
    later = [path.name for path in list_checkpoints(run.folder) if step_of(path) > start] if run.rank == 0 else []
    if later:
        run.say(f"  {', '.join(later)} in {run.folder} will be deleted when this run saves its first checkpoint")
    return resume


def build_trainer(
    run: Run, dataset: Any, tokens: int, hooks: Hooks, resume: Resume | None, wandb: Wandb | None
) -> ProjectorTrainer:
    config, args, chosen = run.config, run.args, run.config.trainer
    if chosen.torch_compile:
        llm = run.model.get_submodule(attached(run.model).family.llm)  # type: ignore[union-attr]
        compile_parts(llm, chosen.torch_compile_backend, chosen.torch_compile_mode)
    share = config.train.share_prefix and not is_streamed(config.data)
    prefix = find_prefix(run.model, dataset) if share else None
    recomputes = args.gradient_checkpointing or args.activation_checkpointing
    layout = choose_layout(run.model, config.data.batching, prefix, recomputes)
    return ProjectorTrainer(
        model=run.model,
        args=args,
        train_dataset=dataset,
        collator=dataset.collator(),
        batches=build_batches(run, dataset, tokens, packed=isinstance(layout, PackedRow)),
        layout=layout,
        loss=config.train.loss,
        stop=run.stop,
        watchdog=run.watchdog,
        hooks=hooks,
        resume=resume,
        data_timeout=chosen.data_timeout or chosen.hang_timeout,
        callbacks=[
            RecordConfig(config),
            ProgressBar(),
            Metrics(run.folder / "metrics.jsonl"),
            *wandb_callbacks(run, wandb),
        ],
    )


def start_wandb(run: Run, tokens: Tokens) -> Wandb | None:
    """On rank 0, where it is enabled and installed."""
    if not run.config.wandb.enabled or run.rank != 0:
        return None
    facts = {
        "world_size": run.world_size,
        "trainable_parameters": count_parameters(run.model),
        "tokens_per_image": tokens[0],
        "tokens_per_image_before": tokens[1],
    }
    try:
        return Wandb(run.config, run.config.model_dump(mode="json"), facts)
    except Exception as error:
        run.say(f"W&B is not available ({error}); metrics.jsonl has everything")
        return None


def wandb_callbacks(run: Run, wandb: Wandb | None) -> list[Any]:
    """W&B, and what it is shown of the held-out questions while the model learns."""
    if not wandb:
        return []
    section, held_out = run.config.report, run.config.eval
    if held_out is None or not section.enabled or run.config.trainer.sharded:
        return [wandb]
    look = ShowAnswers(
        wandb.log_computed, lambda: load_questions(run.config, run.processor), run.processor, held_out,
        section.images, section.look_every,
    )  # fmt: skip
    return [wandb, look]


# Tell


def tell_finished(config: RunConfig, step: int) -> None:
    """Say that the run is finished already, in place of running it."""
    folder = Path(config.output_dir)
    found = [f"{name}: {folder / name}" for name in (*RESULTS.values(), "report") if (folder / name).is_dir()]
    print(
        f"resuming from {folder / f'checkpoint-{step}'} (step {step} of {step}): this run is finished, nothing is trained or written. "
        f"trainer.resume=null trains again\n{'; '.join(found)}",
        file=sys.stderr,
        flush=True,
    )


def announce(run: Run, trainer: ProjectorTrainer, dataset: Any, tokens: Tokens) -> None:
    """What will train, in which batches, on what."""
    args = run.args
    trainable, total = count_parameters(run.model), count_parameters(run.model, trainable=False)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * run.world_size
    size = size_of(dataset)
    samples = "streamed samples" if size is None else count_of(size, "sample")
    run.say(
        f"training {trainable:,} of {total:,} parameters ({', '.join(describe_trained(run.config.train))})\n"
        f"{count_of(run.world_size, 'process')} x {count_of(args.per_device_train_batch_size, 'sample')} "
        f"x {args.gradient_accumulation_steps} accumulated = {batch} per step; {samples}; "
        f"{run.config.trainer.deepspeed}; {run.config.model.dtype} on {args.device.type}"
    )
    if run.config.zip.budgets is not None:
        run.say(f"each image at one of {describe_budgets(attached(run.model))} visual tokens")  # type: ignore[arg-type]
    elif tokens[1]:
        run.say(f"{tokens[0]} of {tokens[1]} visual tokens per image")
    llm = run.model.get_submodule(attached(run.model).family.llm)  # type: ignore[union-attr]
    compiled = [describe_compiled(llm)] if run.config.trainer.torch_compile else []
    run.say("; ".join([*trainer.layout.describe(), *compiled]))


# End


def end_early(run: Run, trainer: ProjectorTrainer, wandb: Wandb | None) -> None:
    """End a run that was stopped by a signal.

    Raises:
        RunEnded: always.
    """
    if wandb:
        wandb.finish()
    raise RunEnded(
        Exit.STOPPED,
        f"stopped by {run.stop.signal or 'a signal to another rank'} at step {trainer.state.global_step} of "
        f"{trainer.state.max_steps}, which is saved. Start the same command again to continue",
    )
