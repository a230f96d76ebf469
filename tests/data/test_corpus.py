"""Every kind of bad input, end to end: used or rejected as documented, with a reason, and never an exception."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from data.rejects import RejectLog, TooManyRejected
from data.sample import Rejection
from data.template import IGNORE
from tests.data import kit
from tests.data.corpus import Case, corpus

LENGTH = 300
DOCS = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> tuple[list[Case], Path]:
    folder = tmp_path_factory.mktemp("corpus")
    cases = corpus(folder)
    (folder / "bad.jsonl").write_bytes(b"\n".join(case.line() for case in cases) + b"\n")
    return cases, folder


def open_data(folder: Path, template: str = "llava_v1", **changes):
    source = {"path": str(folder / "bad.jsonl"), "images": str(folder / "images")}
    return kit.dataset(folder, source, template=template, max_length=LENGTH, frames=4, **changes)


@pytest.mark.parametrize("template", ["llava_v1", "chat"])
def test_each_case_has_its_documented_outcome(bad, template):
    cases, folder = bad
    data = open_data(folder, template)
    assert len(data) == len(cases)
    found = [data[index] for index in range(len(data))]
    outcome = [item.reason if isinstance(item, Rejection) else None for item in found]
    assert dict(zip([case.name for case in cases], outcome, strict=True)) == {case.name: case.reason for case in cases}
    image = data.encoder.processor.tokenizer.convert_tokens_to_ids("<image>")
    for item, case in zip(found, cases, strict=True):
        if isinstance(item, Rejection):
            continue
        assert len(item["input_ids"]) == len(item["labels"]) <= LENGTH, case.name
        assert (item["labels"] != IGNORE).any(), case.name
        images = len(item["pixel_values"]) if "pixel_values" in item else 0
        assert int((item["input_ids"] == image).sum()) == images * kit.PLACEHOLDERS, case.name


def test_cutting_leaves_out_rounds_whose_images_do_not_fit(bad):
    cases, folder = bad
    data = open_data(folder)
    number = [case.name for case in cases].index("more rounds than fit")
    item = data[number]
    whole = kit.dataset(folder, {"path": str(folder / "bad.jsonl"), "images": str(folder / "images")}, max_length=4096)[
        number
    ]
    kept = len(item["input_ids"])
    assert 1 < len(item["pixel_values"]) < 30
    assert item["input_ids"].tolist() == whole["input_ids"][:kept].tolist()
    assert item["input_ids"][-1] == data.encoder.processor.tokenizer.eos_token_id, "the last round kept is whole"


def test_nothing_is_cut_where_that_is_not_wanted(bad):
    cases, folder = bad
    data = open_data(folder, overlong="reject")
    names = [case.name for case in cases]
    for name in ("over-long answer", "more rounds than fit"):
        assert data[names.index(name)].reason == "too long"


def test_through_workers_used_and_rejected_make_read(bad, tmp_path):
    """The whole way: workers, batches, the log; and the run stops, for this is more bad data than anybody wants."""
    cases, folder = bad
    data = open_data(folder)
    log = RejectLog(tmp_path / "rejected.jsonl", 1.0, total=len(data))
    used = 0
    for batch in DataLoader(data, batch_size=7, sampler=data.sampler(7), collate_fn=data.collator(), num_workers=2):
        rejections = batch.pop("rejections", [])
        log.read(len(rejections))
        log.add(rejections)
        used += int((batch["labels"] != IGNORE).any(dim=1).sum())
    assert used + log.rejected == len(data)
    expected = [case.reason for case in cases if case.reason]
    assert sorted(log.reasons.elements()) == sorted(expected)
    log.max_rejected = 0.01
    with pytest.raises(TooManyRejected, match=r"data.max_rejected=0.01"):
        log.check()


def test_rejections_name_the_record(bad):
    cases, folder = bad
    data = open_data(folder)
    for index, case in enumerate(cases):
        item = data[index]
        if isinstance(item, Rejection):
            assert (item.source, item.index) == ("bad", index)
            assert item.id == (case.record["id"] if isinstance(case.record, dict) else f"#{index}")


@pytest.mark.parametrize("where", ["reading", "making"])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), KeyError("x"), RecursionError()])
def test_what_nobody_thought_of_is_a_rejection_too(tmp_path, where, error):
    def fail(*_):
        raise error

    data = kit.dataset(tmp_path, kit.write_json(tmp_path / "a.json", kit.text_records(3)))
    if where == "reading":
        data.sources[0].records = type("Broken", (), {"__len__": lambda _: 3, "__getitem__": fail})()
    else:
        data = data.with_transform(fail)
    assert data[1] == Rejection(
        "#1" if where == "reading" else "r1", "a", 1, "unexpected error", f"{type(error).__name__}: {error}"
    )


def test_a_file_that_shrinks_under_the_reader_is_no_exception(tmp_path):
    path = Path(kit.write_json(tmp_path / "a.jsonl", kit.text_records(20), lines=True))
    data = kit.dataset(tmp_path, path)
    os.truncate(path, 100)
    found = [data[index] for index in range(len(data))]
    assert sum(isinstance(item, Rejection) for item in found) >= 18


def test_the_documentation_says_the_same(bad):
    """The table in docs/data.md has a row for each case of the corpus, in words and with the reason."""
    table = DOCS.read_text(encoding="utf-8").partition("## Rejected records")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|", table, re.MULTILINE))
    for case in bad[0]:
        assert case.name in rows, f"docs/data.md has no row for {case.name!r}"
        if case.reason:
            assert f"`{case.reason}`" in rows[case.name], f"{case.name}: docs say {rows[case.name]!r}"
        else:
            assert rows[case.name].startswith("used"), f"{case.name}: docs say {rows[case.name]!r}"
