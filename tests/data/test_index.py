"""The index finds exactly the records that parsing the whole file finds, keeps them on disk, and nothing in memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import index, storage
from data.config import SourceConfig
from data.index import DiskTable, IndexFileError, cache_folder, file_key, index_json
from data.records import JsonRecords, content_digest

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
        (b"", "contains no records"),
        (b"  \n", "contains no records"),
        (b'[{"a": 1}, {"a": "never clo', "never ends"),
        (b'[{"a": 1}}, {"a": 2}]', "brackets don't match"),
        (b'{\n "data": [\n  {"a": 1}\n ]\n}', "neither a JSON array of records nor JSON Lines"),
        (b"id,question\n1,what\n", "neither a JSON array of records nor JSON Lines"),
        ('[{"a": 1}]'.encode("utf-16"), "UTF-16"),
        (b'[{"a": 1}]\n[{"a": 2}]\n', "the array ends at byte 10, but is followed by"),
        (b'[{"a": 1}] x', "the array ends at byte 10, but is followed by"),
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


def test_every_flipped_bit_of_an_index_is_noticed_and_the_index_made_again(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    stored = Path(index_json(str(path), tmp_path).path)
    good = stored.read_bytes()
    for byte in range(len(good)):
        bad = bytearray(good)
        bad[byte] ^= 4
        stored.write_bytes(bad)
        caplog.clear()
        table = index_json(str(path), tmp_path)
        assert [table[row] for row in range(len(table))] == [(0, 8), (9, 17)], byte
        assert len(caplog.records) == 1, byte
        assert stored.name in caplog.text
        assert stored.read_bytes() == good


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    table = Path(index_json(str(tmp_path / "a.jsonl"), tmp_path).path)
    script = (
        "import os, sys; from pathlib import Path; from data.storage import open_part\n"
        "open_part(Path(sys.argv[1])).write(b'half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(table)], check=False)
    assert len(list(tmp_path.glob(".*.part"))) == 1
    table.unlink()
    index_json(str(tmp_path / "a.jsonl"), tmp_path)
    assert list(tmp_path.glob(".*")) == []


def test_a_live_writer_of_another_process_is_left_alone(tmp_path):
    script = (
        "import sys; from pathlib import Path; from data.storage import open_part\n"
        "file = open_part(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "x")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert storage.remove_leftovers(tmp_path) == []
        (part,) = tmp_path.glob(".*.part")
        writer.kill()
        writer.wait()
        assert storage.remove_leftovers(tmp_path) == [part]
        assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "folder"])
def test_a_digest_of_the_content_goes_by_content_alone(tmp_path, name):
    """One letter changed in the middle of a megabyte, the same size, time and ends."""
    rows = [{"id": str(n), "question": "what?", "answer": f"{n:08}"} for n in range(20_000)]
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    file = path / "a.csv" if name == "folder" else path
    lines = [json.dumps(row) for row in rows]
    text = {".json": "[" + ",\n".join(lines) + "]", ".jsonl": "\n".join(lines)}
    file.write_text(text.get(file.suffix, "\n".join(["id,answer", *(f"{row['id']},{row['answer']}" for row in rows)])))

    def digest_of(path) -> str:
        return content_digest([SourceConfig(path=str(path))], str(tmp_path / "cache"))

    before = digest_of(path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = shutil.move(path, elsewhere / f"b{path.suffix}")
    assert digest_of(moved) == before
    path = Path(shutil.move(moved, path))
    status = os.stat(file)
    file.write_text(file.read_text().replace("00010000", "00010001"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    assert os.stat(file).st_size == status.st_size
    assert digest_of(path) != before
    assert content_digest([SourceConfig(path=str(path), name="x", fraction=0.5)], str(tmp_path / "cache")) == digest_of(
        path
    )


def test_a_digest_of_a_large_file_notices_its_size_and_its_ends(tmp_path):
    file = tmp_path / "a.parquet"
    digests = set()
    for size, byte in ((5 << 20, 0), ((5 << 20) + 1, 0), (5 << 20, 1)):
        file.write_bytes(bytes(size - 1) + bytes([byte]))
        digests.add(content_digest([SourceConfig(path=str(file))]))
    assert len(digests) == 3
