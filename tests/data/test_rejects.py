"""What was not used is counted, listed, and too much of it ends the run."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from data.rejects import REASONS, SOONEST, RejectLog, TooManyRejected, count_allowed
from data.sample import LONGEST, Rejection

ROOT = Path(__file__).parents[2]


def bad(number: int, reason: str = "file missing", source: str = "a", name: str | None = None):
    return {"id": name or f"r{number}", "source": source, "index": number, "reason": reason, "detail": "x.jpg"}


def listed(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rejections_are_counted_and_listed_once_over_epochs(tmp_path):
    log = RejectLog(tmp_path / "run" / "rejected.jsonl", 0.5)
    for _ in range(3):
        log.read(10)
        log.add([bad(1), bad(2, "turn order")])
        log.add([bad(3)])
    assert log.rejected == 3
    assert log.reasons == {"file missing": 2, "turn order": 1}
    assert log.summary() == "2 file missing, 1 turn order"
    assert listed(log.path) == [bad(1), bad(2, "turn order"), bad(3)]


def test_records_that_share_an_id_are_told_apart(tmp_path):
    log = RejectLog(tmp_path / "rejected.jsonl", 0.5)
    assert len(log.add([bad(1, name="same"), bad(2, name="same"), bad(1, name="same", source="b")])) == 3
    assert log.rejected == 3


def test_one_bad_sample_of_the_first_ten_stops_nothing(tmp_path):
    log = RejectLog(tmp_path / "rejected.jsonl", 0.01)
    log.read(10)
    log.add([bad(1)])


def test_too_many_stop_the_run_and_are_listed_by_then(tmp_path):
    log = RejectLog(tmp_path / "rejected.jsonl", 0.01)
    allowed = SOONEST // 100
    log.add([bad(number) for number in range(allowed)])
    with pytest.raises(TooManyRejected, match=rf"{allowed + 1} bad records.*max_rejected=0.01.*11 file missing"):
        log.add([bad(allowed)])
    assert len(listed(log.path)) == allowed + 1


def test_the_share_is_of_what_was_read(tmp_path):
    log = RejectLog(tmp_path / "rejected.jsonl", 0.01)
    log.read(5000)
    log.add([bad(number) for number in range(50)])
    with pytest.raises(TooManyRejected):
        log.add([bad(51)])


def test_a_small_data_set_is_judged_by_its_size_and_not_by_its_epochs(tmp_path):
    log = RejectLog(tmp_path / "rejected.jsonl", 0.02, total=200)
    log.add([bad(1), bad(2), bad(3), bad(4)])
    log.read(100_000)
    with pytest.raises(TooManyRejected):
        log.add([bad(5)])


@pytest.mark.parametrize(
    ("total", "share", "count"),
    [
        (60, 0.01, 3),
        (59, 0.01, 2),
        (24, 0.01, 1),
        (19, 0.01, 0),
        (19, 0.2, 3),
        (300, 0.01, 3),
        (900, 0.01, 9),
        (60, 0, 0),
    ],
)
def test_some_bad_records_of_a_small_set_stop_nothing(tmp_path, total, share, count):
    assert count_allowed(share, total) == count
    log = RejectLog(tmp_path / "rejected.jsonl", share, total=total)
    log.read(total)
    log.add([bad(number) for number in range(count)])
    with pytest.raises(TooManyRejected, match=rf"allows {count} of {total}\."):
        log.add([bad(count)])


def test_none_allowed_means_none(tmp_path):
    log = RejectLog(tmp_path / "rejected.jsonl", 0.0, total=24)
    log.read(8)
    with pytest.raises(
        TooManyRejected, match=r"^1 bad record among the first 8 read; data.max_rejected=0 allows 0 of 24\. 1 "
    ):
        log.add([bad(1)])


def test_a_run_resumed_goes_on_counting(tmp_path):
    path = tmp_path / "rejected.jsonl"
    RejectLog(path, 0.5).add([bad(1), bad(2)])
    with open(path, "a") as file:
        file.write('{"id": "r3", "sour')  # killed while writing
    log = RejectLog(path, 0.5, resume=True)
    assert log.rejected == 2
    assert log.add([bad(2), bad(3)]) == [bad(3)]
    assert listed(path) == [bad(1), bad(2), bad(3)]
    assert RejectLog(path, 0.5).rejected == 0, "a run that is not resumed begins anew"
    assert path.read_text() == ""


def test_whatever_a_record_says_can_be_written_down(tmp_path):
    """Half a surrogate pair, which JSON's escapes can spell, is no UTF-8; a megabyte of column names is no reason."""
    log = RejectLog(tmp_path / "r.jsonl", 1.0)
    rejection = Rejection("\ud83d", "a", 3, "file missing", "x" * 10**6 + "\ud83d")
    assert log.add([rejection.as_dict(), Rejection("y" * 10**6, "a", 4, "no answer").as_dict()])
    first, second = listed(tmp_path / "r.jsonl")
    assert (first["id"], len(first["detail"]), len(second["id"])) == ("\\ud83d", LONGEST, LONGEST)


def test_every_reason_used_is_listed_and_every_one_listed_is_used():
    used = set()
    raised = ("Reject", "ImageError", "PromptError")  # the library's own become a Reject in `data.sample.rejecting`
    for file in {*(ROOT / "data").rglob("*.py"), *(ROOT / "visionzip").rglob("*.py")} - {ROOT / "data" / "sample.py"}:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in raised:
                assert isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}: a reason must be countable"
                used.add(node.args[0].value)
    assert used | {"unexpected error"} == set(REASONS)
