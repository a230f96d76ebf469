"""The index finds exactly the records that parsing the whole file finds, keeps them on disk, and nothing in memory."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import index
from data.index import DiskTable, IndexFileError, cache_folder, file_key, index_json
from data.records import JsonRecords

text = st.text(alphabet='ab"\\,[]{}\n é🐶', max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


def found(path) -> list:
    raw = path.read_bytes()
    return [json.loads(raw[start:end]) for part in index.scan(str(path)) for start, end in part]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(values, max_size=6), chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii=st.booleans()
)
def test_an_array_is_indexed_as_json_reads_it(tmp_path_factory, rows, chunk, indent, ascii):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(" \n" + json.dumps(rows, indent=indent, ensure_ascii=ascii) + "\n", encoding="utf-8")
    whole = index.CHUNK
    index.CHUNK = chunk
    try:
        assert found(path) == rows
    finally:
        index.CHUNK = whole


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(text, values, max_size=3), min_size=1, max_size=6), chunk=st.integers(1, 40))
def test_lines_are_indexed_blank_ones_left_out(tmp_path_factory, rows, chunk):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\r\n\n  \n".join(json.dumps(row).encode() for row in rows) + b"\r\n \n")
    whole = index.CHUNK
    index.CHUNK = chunk
    try:
        assert found(path) == rows
    finally:
        index.CHUNK = whole


@pytest.mark.parametrize("ending", ["", "\n"])
def test_the_last_line_needs_no_newline(tmp_path, ending):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}' + ending)
    assert found(path) == [{"a": 1}, {"a": 2}]


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    for name, body in {"a.json": '[{"a": 1}]', "a.jsonl": '{"a": 1}\n'}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + body.encode())
        assert found(tmp_path / name) == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"  \n", "holds no records"),
        (b'[{"a": 1}, {"a": "never clo', "never ends"),
        (b'[{"a": 1}}, {"a": 2}]', "brackets don't match"),
        (b'{\n "data": [\n  {"a": 1}\n ]\n}', "neither a JSON array of records nor JSON Lines"),
        (b"id,question\n1,what\n", "neither a JSON array of records nor JSON Lines"),
        ('[{"a": 1}]'.encode("utf-16"), "UTF-16"),
        (b'[{"a": 1}]\n[{"a": 2}]\n', "behind the array's end at byte 10"),
        (b'[{"a": 1}] x', "behind the array's end at byte 10"),
    ],
)
def test_a_file_that_cant_be_indexed_says_why(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(IndexFileError, match=message):
        list(index.scan(str(path)))


def test_records_are_read_by_position(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"id": n, "text": "é" * n} for n in range(20)]
    path.write_text(json.dumps(rows, ensure_ascii=False))
    records = JsonRecords(str(path), str(tmp_path / "cache"))
    assert [records[n] for n in range(len(records))] == rows
    again = pickle.loads(pickle.dumps(records))
    assert again[19] == rows[19]
    with pytest.raises(IndexError):
        records[20]
    assert len(pickle.dumps(records)) < 1000, "a worker is sent paths, not offsets"


def test_the_index_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    scans = []
    real = index.scan
    monkeypatch.setattr(index, "scan", lambda file: scans.append(file) or real(file))
    for _ in range(3):
        assert len(index_json(str(path), tmp_path)) == 1
    assert len(scans) == 1
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert len(index_json(str(path), tmp_path)) == 2
    assert len(scans) == 2


def test_a_change_of_the_same_size_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    first = file_key(str(path))
    status = os.stat(path)
    path.write_text('{"a": 2}\n')
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # even the time is the same
    assert file_key(str(path)) != first


def test_a_damaged_index_is_made_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    stored = index_json(str(path), tmp_path).path
    for content in (b"", b"VZIDX002" + b"\0" * 40, Path(stored).read_bytes()[:-8]):
        with open(stored, "wb") as file:
            file.write(content)
        table = index_json(str(path), tmp_path)
        assert [table[0], table[1]] == [(0, 8), (9, 17)]


def test_a_table_half_written_is_never_seen(tmp_path):
    def dies():
        yield np.array([[1, 2]])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DiskTable.write(tmp_path / "t.idx", dies(), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_cant_be_written_is_replaced(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")  # root may write anywhere, so a folder without permission would test nothing
    folder = cache_folder(str(blocked))
    assert folder.is_dir()
    assert tmp_path not in folder.parents
    assert "can't be written" in caplog.text
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    assert JsonRecords(str(path), str(blocked))[0] == {"a": 1}
