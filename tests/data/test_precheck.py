"""What will be rejected is mostly known before anything is computed, with the reasons that reading it gives."""

from __future__ import annotations

import json

import pytest

from data import images
from data.precheck import check_records
from data.sample import Rejection
from tests.data import kit


def rows(folder) -> list:
    """Seven records without a fault that shows before decoding, and four with one."""
    kit.write_image(folder / "a.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "no-image.png").write_text("not found")  # only decoding tells
    (folder / "frames").mkdir()
    kit.write_image(folder / "frames" / "1.png")
    good = [kit.record(number, "a.png" if number % 2 else None) for number in range(5)]
    video = {**kit.record(5), "video": "frames"}
    return [*good, video, kit.record(6, "no-image.png"), kit.record(7, "gone.png"), kit.record(8, "empty.png"),
            kit.record(9, "../a.png"), {"id": "r10", "conversations": []}]  # fmt: skip


def test_rejections_are_those_that_reading_gives(tmp_path, monkeypatch):
    data = kit.dataset(tmp_path, kit.write_json(tmp_path / "a.json", rows(tmp_path)))
    read = [item for item in (data[index] for index in range(len(data))) if isinstance(item, Rejection)]
    monkeypatch.setattr(images, "decode_image", lambda *_: pytest.fail("decoded"))
    looked_at, found = check_records(data)
    assert looked_at == len(data) == 11
    assert {(item.id, item.index, item.reason) for item in found} == {
        (item.id, item.index, item.reason) for item in read if item.id != "r6"
    }
    assert len(found) == 4


def test_of_a_large_set_the_first_of_an_epoch_are_looked_at(tmp_path):
    data = kit.dataset(tmp_path, kit.write_json(tmp_path / "a.json", kit.text_records(50)))
    assert check_records(data, limit=8) == (8, [])
    weighted = {
        "path": kit.write_json(tmp_path / "b.json", [*kit.text_records(5), kit.record(5, "gone.png")]),
        "weight": 3.0,
    }
    looked_at, found = check_records(kit.dataset(tmp_path, weighted))
    assert (looked_at, [json.loads(json.dumps(item.as_dict()))["id"] for item in found]) == (6, ["r5"])
