"""Records and bytes changed at random: no exception leaves the pipeline, and used + rejected = read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.dataset import InstructionDataset
from data.rejects import REASONS
from data.sample import Rejection
from data.template import IGNORE
from tests.data import kit

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PROCESSOR = kit.processor()
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**20),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["<image>", "<video>", "</s>", "../a.png", "a.png", "\ud800", "gpt", "human", "", "x" * 4000]),
    st.lists(st.sampled_from(["a.png", "<image>", 1, None, {}]), max_size=3),
    st.dictionaries(
        st.sampled_from(["from", "value", "role", "content", "bytes", "path", "type"]), st.text(max_size=3), max_size=2
    ),
)
RECORDS: list[dict[str, Any]] = [
    {**kit.record(0, "a.png"), "types": ["colour"]},
    kit.record(1),
    {
        "id": 2,
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
    },
    {
        "images": ["a.png", "a.png"],
        "texts": [{"user": "Which?", "assistant": "B"}, {"user": "Sure?", "assistant": "Yes"}],
    },
    {"question": "What?", "answer": "A cat.", "image": "a.png"},
    {"image": "a.png", "caption": "A cat."},
    {"video": "frames", "conversations": kit.record(0)["conversations"]},
]


def photo(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PHOTOS = {kind: photo(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "frames").mkdir()
    for name in ("a.png", "frames/0.png", "frames/1.png"):
        (folder / name).write_bytes(PHOTOS["PNG"])
    return folder


def opened(folder: Path, template: str = "llava_v1") -> InstructionDataset:
    return kit.dataset(folder, folder / "a.jsonl", using=PROCESSOR, template=template, max_length=200, max_pixels=10**6)


def consume(data: InstructionDataset) -> tuple[int, list[Rejection], int]:
    """(used, rejected, read), through the batch as well."""
    items = [data[index] for index in range(len(data))]
    batch = data.collator()(items)
    rejected = [item for item in items if isinstance(item, Rejection)]
    used = int((batch["labels"] != IGNORE).any(dim=1).sum())
    assert len(batch.get("rejections", [])) == len(rejected)
    assert {item.reason for item in rejected} <= set(REASONS)
    image = PROCESSOR.tokenizer.convert_tokens_to_ids("<image>")
    assert int((batch["input_ids"] == image).sum()) == len(batch["pixel_values"]) * kit.PLACEHOLDERS
    return used, rejected, len(data)


@st.composite
def changed_record(draw: Any) -> Any:
    """A record with up to three of its nodes replaced, removed or doubled."""
    record = json.loads(json.dumps(draw(st.sampled_from(RECORDS))))
    for _ in range(draw(st.integers(1, 3))):
        nodes = list(walk(record))
        parent, key = draw(st.sampled_from(nodes)) if nodes else (None, None)
        action = draw(st.sampled_from(["replace", "remove", "double"]))
        if parent is None:
            return draw(JUNK)
        if action == "replace":
            parent[key] = draw(JUNK)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, parent[key])
    return record


def walk(node: Any):
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from walk(node[key])


@FUZZ
@given(rows=st.lists(changed_record(), min_size=1, max_size=4), template=st.sampled_from(["llava_v1", "chat", "plain"]))
def test_records_changed_at_random(folder, rows, template):
    good = [RECORDS[0]] * len(rows)  # so that the file is one of records, whatever the others are
    lines = [json.dumps(row) for pair in zip(good, rows, strict=True) for row in pair]
    (folder / "a.jsonl").write_text("\n".join(lines))
    used, rejected, read = consume(opened(folder, template))
    assert used + len(rejected) == read == len(lines)
    assert used >= len(rows)
    unexpected = [item.detail for item in rejected if item.reason == "unexpected error"]
    assert not unexpected, "each kind of bad record has a reason of its own"


EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "drop", "add", "cut"]), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, edits: list[tuple[float, str, int]]) -> bytes:
    changed = bytearray(content)
    for place, action, byte in edits:
        at = int(place * max(len(changed) - 1, 0))
        if action == "flip" and changed:
            changed[at] = byte
        elif action == "drop":
            del changed[at : at + 1 + byte % 8]
        elif action == "add":
            changed[at:at] = bytes([byte]) * (1 + byte % 3)
        elif action == "cut" and byte < 32:
            del changed[at:]
    return bytes(changed)


@FUZZ
@given(edits=EDITS, array=st.booleans())
def test_bytes_of_the_file_changed_at_random(folder, edits, array):
    body = json.dumps(RECORDS, indent=1) if array else "\n".join(map(json.dumps, RECORDS))
    (folder / "a.jsonl").write_bytes(edited(body.encode(), edits))
    try:
        data = opened(folder)
    except ValueError as error:  # no file of records any more: said at the start, with its name
        if "a.jsonl" not in str(error):
            raise
        return
    used, rejected, read = consume(data)
    assert used + len(rejected) == read


@FUZZ
@given(edits=EDITS, kind=st.sampled_from(sorted(PHOTOS)), embedded=st.booleans())
def test_bytes_of_an_image_changed_at_random(folder, edits, kind, embedded):
    (folder / "b.png").write_bytes(edited(PHOTOS[kind], edits))
    (folder / "a.jsonl").write_text(json.dumps(kit.record(0, "b.png")))
    used, rejected, read = consume(opened(folder))
    assert used + len(rejected) == read == 1
    assert [item for item in rejected if item.reason == "unexpected error"] == []
