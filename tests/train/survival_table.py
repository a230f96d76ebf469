"""The table of docs/resilience.md: what was done to runs, how often, and how often all was well afterwards.

    python -m tests.train.survival_table --rounds 3

runs the tests that do it, and counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]

# test → (what happens, what has to be true afterwards, how often in one run of the test)
EVENTS = {
    "test_killed_ten_times_it_ends_with_the_same_projector": (
        "SIGKILL to all ranks, every other time while a checkpoint is written",
        "the final projector is bit for bit that of a run never killed, each step logged once",
        11,
    ),
    "test_a_killed_run_ends_with_the_same_projector": (
        "SIGKILL between checkpoints of a run with several budgets, from pixels and from the token cache",
        "the final projector and the losses are bit for bit those of a run never killed",
        1,
    ),
    "test_a_signal_to_one_rank_saves_and_ends_all": (
        "SIGTERM or SIGUSR1 to one rank of two",
        "both save, exit code 75, goes on where it stopped",
        1,
    ),
    "test_the_launcher_passes_the_exit_code_on": ("SIGTERM to a rank under `deepspeed`", "the launcher ends with 75", 1),
    "test_a_rank_that_dies_ends_the_other": ("SIGKILL to one rank of two", "the other ends, checkpoint intact", 1),
    "test_a_rank_that_hangs_ends_both": (
        "SIGSTOP to one rank of two",
        "exit code 71 within trainer.hang_timeout, checkpoint intact",
        1,
    ),
    "test_a_loss_that_is_not_finite_ends_the_run": ("a loss that is NaN", "exit code 70, no NaN in any checkpoint", 1),
    "test_a_gradient_that_is_not_finite_ends_the_run": (
        "a gradient that is NaN, under ZeRO-0, 2 and 3",
        "exit code 70, no NaN in any checkpoint",
        1,
    ),
    "test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint": (
        "no room for a checkpoint",
        "exit code 74, the older checkpoint intact, goes on when there is room",
        1,
    ),
    "test_a_full_disk_at_the_end_is_said_in_a_sentence_and_the_export_follows": (
        "no room for the final export",
        "exit code 74 and one sentence; exported when there is room, bit for bit",
        1,
    ),
    "test_a_weight_of_the_llm_that_is_not_finite_ends_every_rank_at_the_export": (
        "a NaN in a row of the LLM's embedding that no record reads, under ZeRO-3",
        "exit code 70 on every rank at the export, nothing exported",
        1,
    ),
    "test_a_kill_between_the_last_checkpoint_and_the_export_costs_nothing": (
        "SIGKILL between the last checkpoint and the export",
        "no step is taken again, the export follows bit for bit, each step logged once",
        3,
    ),
    "test_from_the_last_checkpoint_nothing_is_trained": (
        "a finished run started again, with its export whole, damaged or gone",
        "nothing is trained; nothing is written but an export that was not complete",
        3,
    ),
    "test_settings_that_can_not_change_are_refused_with_both_values": (
        "a resume with another learning rate, schedule, warm-up, weight decay, clipping, beta or LoRA alpha",
        "exit code 2 and both values, no file changed",
        7,
    ),
    "test_what_takes_effect_is_named": (
        "a resume with other records behind the same path, another length of samples, another seed",
        "goes on, each named",
        1,
    ),
    "test_a_run_that_starts_anew_leaves_no_checkpoint_of_the_one_before": (
        "a run started anew where an earlier one left later checkpoints",
        "its own are kept and resumed from",
        1,
    ),
    "test_a_start_that_fails_leaves_nothing_behind": ("a start that fails", "exit code 2, no file left", 1),
    "test_a_directory_that_can_not_be_made_is_said_before_anything_is_loaded": (
        "an output_dir that can't be made",
        "exit code 74 and one sentence, before the model is loaded",
        1,
    ),
    "test_every_damage_to_every_file_is_noticed": (
        "a checkpoint's file removed, emptied, cut, lengthened or one bit flipped",
        "noticed and named",
        1,
    ),
    "test_a_file_that_the_manifest_does_not_list_is_refused_by_name": (
        "a shard, a folder or another file copied into a checkpoint",
        "noticed and named",
        1,
    ),
    "test_checkpoints_of_later_steps_do_not_push_out_the_one_just_written": (
        "damaged checkpoints newer than the one resumed from, while rotating",
        "the one just written is kept",
        1,
    ),
    "test_a_kill_at_any_moment_leaves_the_older_one": (
        "an end at any write, sync or rename while saving and rotating",
        "a whole checkpoint is left",
        1,
    ),
    "test_a_run_goes_on_from_the_newest_whole_one_and_says_so": (
        "the two newest checkpoints damaged",
        "goes on from the third, bit for bit, naming the two",
        1,
    ),
    "test_no_network_from_the_start": ("W&B asked for, no network", "trains to the end", 1),
    "test_a_network_that_goes_away": ("W&B's server gone in mid-run", "trains on, ends in time", 1),
    "test_a_killed_and_resumed_run_is_one_run_with_each_step_once": (
        "SIGKILL between checkpoints with W&B offline",
        "one W&B run that holds each step once, also after `wandb sync`",
        1,
    ),
    "test_a_second_run_in_the_same_directory_is_refused": (
        "a second run started into the directory of a running one",
        "exit code 2 and one sentence; the first goes on",
        1,
    ),
    "test_torchrun_on_two_nodes_that_share_no_folder": (
        "two nodes, the checkpoint on one of them only",
        "both go on from it",
        1,
    ),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.train.survival_table", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    rounds = parser.parse_args().rounds
    happened: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            report = Path(folder) / f"{number}.xml"
            names = " or ".join(EVENTS)
            subprocess.run(
                [sys.executable, "-m", "pytest", "tests/train", "-q", "-k", names, f"--junitxml={report}"],
                cwd=ROOT,
                check=False,
            )
            for case in ET.parse(report).getroot().iter("testcase"):
                name = str(case.get("name")).split("[")[0]
                if name in EVENTS:
                    happened[name] += EVENTS[name][2]
                    good = case.find("failure") is None and case.find("error") is None
                    survived[name] += EVENTS[name][2] if good else 0
    print("\n| event | expected outcome | times | passed |\n|---|---|---|---|")
    for name, (what, then, _) in EVENTS.items():
        print(f"| {what} | {then} | {happened[name]} | {survived[name]} |")
    return int(happened != survived)


if __name__ == "__main__":
    raise SystemExit(main())
