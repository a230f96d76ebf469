"""Sources of the `datasets` library: the same items as from JSON, in the layouts of well-known data sets."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.config import DataConfig, SourceConfig
from data.dataset import build_dataset
from data.rejects import REASONS
from data.sample import Rejection
from data.stream import build_stream, is_streamed
from data.template import IGNORE
from tests.data import kit


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf-cache")


def png(seed: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 20 + seed).convert("RGB").save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{seed}.png"}


def next_data(rows: int = 6) -> datasets.Dataset:
    """As LLaVA-NeXT-Data: one embedded image, LLaVA's turns."""
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            "data_source": datasets.Value("string"),
        }
    )
    made = [
        {**kit.record(n, "x", answer=f"Cat {n}."), "image": png(n) if n % 3 else None, "data_source": "s"}
        for n in range(rows)
    ]
    for row in made:
        if row["image"] is None:
            row["conversations"] = kit.record(0, answer="No cat.")["conversations"]
    return datasets.Dataset.from_list(made, features=features)


def cauldron(rows: int = 3) -> datasets.Dataset:
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": [
                {
                    "user": datasets.Value("string"),
                    "assistant": datasets.Value("string"),
                    "source": datasets.Value("string"),
                }
            ],
        }
    )
    text = {"user": "Which?", "assistant": "The second.", "source": "s"}
    return datasets.Dataset.from_list(
        [{"images": [png(n), png(n + 9)], "texts": [text, {**text, "user": "Sure?"}]} for n in range(rows)],
        features=features,
    )


def stored(folder: Path, data: datasets.Dataset, how: str) -> str:
    folder.mkdir(exist_ok=True)
    if how == "parquet":
        data.to_parquet(folder / "a.parquet")
        return str(folder / "a.parquet")
    if how == "folder of parquet":
        half = len(data) // 2
        data.select(range(half)).to_parquet(folder / "train-0.parquet")
        data.select(range(half, len(data))).to_parquet(folder / "train-1.parquet")
        return str(folder)
    data.save_to_disk(folder / "saved")
    return str(folder / "saved") if how == "saved" else str(next((folder / "saved").glob("*.arrow")))


@pytest.mark.parametrize("how", ["parquet", "folder of parquet", "saved", "arrow"])
def test_embedded_images_are_those_of_files(tmp_path, how):
    """Item by item what the same records give as JSON with files beside it."""
    rows = next_data()
    (tmp_path / "images").mkdir()
    listed = []
    for row in rows.with_format("arrow"):
        row = row.to_pylist()[0]
        if row["image"]:
            (tmp_path / "images" / row["image"]["path"]).write_bytes(row["image"]["bytes"])
            row["image"] = row["image"]["path"]
        listed.append(row)
    json_path = kit.write_json(tmp_path / "b.json", listed)
    expected = kit.dataset(tmp_path, {"path": json_path, "images": str(tmp_path / "images")})
    found = kit.dataset(tmp_path, {"path": stored(tmp_path / "hf", rows, how), "reader": "datasets"})
    assert len(found) == len(expected) == 6
    for index in range(6):
        assert found.sample(index).id == expected.sample(index).id
        assert found[index].keys() == expected[index].keys()
        assert all(torch.equal(found[index][key], expected[index][key]) for key in found[index])


def test_the_cauldron(tmp_path):
    data = kit.dataset(tmp_path, stored(tmp_path / "c", cauldron(), "parquet"))
    item = data[0]
    assert item["pixel_values"].shape[0] == 2
    assert [message.role for message in data.sample(0).messages] == ["user", "assistant"] * 2


def test_a_json_source_of_the_same_layout_as_llava_video(tmp_path):
    row = {"id": "v", "video": "clips/a.mp4", "data_source": "s", "conversations": kit.record(0, "x")["conversations"]}
    sample = kit.dataset(tmp_path, kit.write_json(tmp_path / "a.json", [row])).sample(0)
    assert [(media.kind, media.source) for media in sample.media] == [("video", str(tmp_path / "clips/a.mp4"))]


def test_mapped_columns(tmp_path):
    data = datasets.Dataset.from_list(
        [{"pic": png(0), "q": "What?", "a": "A cat."}],
        features=datasets.Features(
            {"pic": datasets.Image(), "q": datasets.Value("string"), "a": datasets.Value("string")}
        ),
    )
    path = stored(tmp_path / "m", data, "parquet")
    columns = {"image": "pic", "question": "q", "answer": "a"}
    item = kit.dataset(tmp_path, {"path": path, "columns": columns})[0]
    assert item["pixel_values"].shape[0] == 1


def test_a_damaged_embedded_image_is_rejected(tmp_path):
    rows = next_data().to_list()
    rows[1]["image"] = {"bytes": b"\x89PNG broken", "path": None}
    data = datasets.Dataset.from_list(rows, features=next_data().features)
    found = kit.dataset(tmp_path, stored(tmp_path / "d", data, "parquet"))
    assert found[1].reason == "unreadable image"
    assert not isinstance(found[2], Rejection)


def test_workers_get_paths_not_records(tmp_path):
    data = kit.dataset(tmp_path, stored(tmp_path / "w", next_data(60), "saved"))
    assert len(pickle.dumps(data.sources[0].records)) < 20_000
    batches = list(DataLoader(data, batch_size=10, collate_fn=data.collator(), num_workers=2))
    assert sum(int((batch["labels"] != IGNORE).any(dim=1).sum()) for batch in batches) == 60


@pytest.mark.parametrize("path", ["nobody/nothing", "absent.parquet", "absent/*.parquet", "empty"])
def test_a_source_that_is_not_there_says_what_would_do(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data source .* can't be read: .*Expected a .json/.jsonl file, a Parquet"):
        kit.dataset(tmp_path, path)


def test_a_json_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        kit.dataset(tmp_path, tmp_path / "absent.json")


# Streams


def stream_config(folder: Path, *paths: str, **changes: Any) -> DataConfig:
    sources = [{"path": path, "streaming": True, "name": f"s{number}", **changes} for number, path in enumerate(paths)]
    return kit.data_config(folder, *sources)


def numbered(folder: Path, count: int, shards: int) -> str:
    folder.mkdir()
    rows = kit.text_records(count)
    for shard in range(shards):
        datasets.Dataset.from_list(rows[shard::shards]).to_parquet(folder / f"train-{shard}.parquet")
    return str(folder)


class Names:
    """In place of an item: what record it is of."""

    def __call__(self, sample):
        return sample.id


@pytest.mark.parametrize("shards", [1, 7])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 3)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_pass_of_a_stream_is_every_record_once(tmp_path, shards, world, workers):
    config = stream_config(tmp_path, numbered(tmp_path / "s", 30, shards))
    using = kit.processor()
    seen: list[str] = []
    for rank in range(world):
        stream = build_stream(config, using, 0, rank, world).with_transform(Names())
        consumers = max(workers, 1)
        share = [
            len(list(stream.sources[0].records(rank * consumers + n, world * consumers))) for n in range(consumers)
        ]
        loader = iter(DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=list))
        # The workers take turns, each with its own share before it begins again.
        taken: list[list[str]] = [[] for _ in range(consumers)]
        for turn in range(max(share) * consumers):
            taken[turn % consumers] += next(loader)
        seen += [name for names, count in zip(taken, share, strict=True) for name in names[:count]]
    assert sorted(seen) == sorted(f"r{number}" for number in range(30))


def test_a_stream_never_ends_and_every_pass_is_shuffled_anew(tmp_path):
    stream = build_stream(
        stream_config(tmp_path, numbered(tmp_path / "s", 12, 1)), kit.processor(), 0, 0, 1
    ).with_transform(Names())
    endless = iter(stream)
    passes = [[next(endless) for _ in range(12)] for _ in range(3)]
    assert all(sorted(names) == sorted(passes[0]) for names in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != sorted(passes[0])


@pytest.mark.parametrize(("workers", "skipped"), [(0, 4), (2, 4), (2, 5), (3, 4)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_stream_goes_on_where_it_stopped(tmp_path, workers, skipped):
    config = stream_config(tmp_path, numbered(tmp_path / "s", 40, 2))

    def batches(skip: int) -> list[list[str]]:
        stream = build_stream(config, kit.processor(), 0, 0, 1).with_transform(Names())
        stream.skip_batches(skip, 3)
        loader = iter(DataLoader(stream, batch_size=3, num_workers=workers, collate_fn=list))
        return [next(loader) for _ in range(12 - skip)]

    assert batches(skipped) == batches(0)[skipped:]


def test_real_batches_of_a_stream_with_bad_records(tmp_path):
    rows = next_data(12).to_list()
    rows[4]["image"] = {"bytes": b"", "path": None}
    path = stored(tmp_path / "r", datasets.Dataset.from_list(rows, features=next_data().features), "parquet")
    stream = build_stream(stream_config(tmp_path, path), kit.processor(), 0, 0, 1)
    loader = iter(DataLoader(stream, batch_size=6, num_workers=2, collate_fn=stream.collator()))
    batches = [next(loader) for _ in range(2)]
    rejections = [rejection for batch in batches for rejection in batch.get("rejections", [])]
    assert [(rejection["id"], rejection["reason"]) for rejection in rejections] == [("r4", "empty file")]
    assert rejections[0]["reason"] in REASONS
    assert sum(int((batch["labels"] != IGNORE).any(dim=1).sum()) for batch in batches) == 11


def test_streams_are_mixed_by_weight_and_with_files(tmp_path):
    json_path = kit.write_json(
        tmp_path / "a.json", [{**row, "id": f"j{n}"} for n, row in enumerate(kit.text_records(50))]
    )
    config = kit.data_config(
        tmp_path, {"path": numbered(tmp_path / "s", 50, 1), "streaming": True, "weight": 3.0}, {"path": json_path}
    )
    assert is_streamed(config)
    stream = build_stream(config, kit.processor(), 0, 0, 1).with_transform(Names())
    endless = iter(stream)
    names = [next(endless) for _ in range(400)]
    assert sum(name.startswith("r") for name in names) == pytest.approx(300, abs=30)
    assert {name for name in names if name.startswith("j")} == {f"j{n}" for n in range(50)}


def test_max_samples_of_a_stream_are_the_first(tmp_path):
    stream = build_stream(
        stream_config(tmp_path, numbered(tmp_path / "s", 30, 1), max_samples=5), kit.processor(), 0, 0, 1
    ).with_transform(Names())
    endless = iter(stream)
    assert {next(endless) for _ in range(15)} == {f"r{n}" for n in range(5)}


def test_what_a_stream_cant_do_is_said(tmp_path):
    config = stream_config(tmp_path, numbered(tmp_path / "s", 4, 1))
    with pytest.raises(ValueError, match="'s0' is streamed: it has no length"):
        build_dataset(config, kit.processor(), 0)
    config.sources[0] = SourceConfig(path=config.sources[0].path, streaming=True, fraction=0.5)
    with pytest.raises(ValueError, match=r"no known length to take fraction=0.5 of"):
        build_stream(config, kit.processor(), 0, 0, 1)


def test_records_of_a_stream_can_be_json_lines(tmp_path):
    """Read by `datasets`, where one asks for it."""
    path = kit.write_json(tmp_path / "a.jsonl", kit.text_records(4), lines=True)
    config = kit.data_config(tmp_path, {"path": path, "streaming": True, "reader": "datasets"})
    stream = build_stream(config, kit.processor(), 0, 0, 1).with_transform(Names())
    endless = iter(stream)
    assert {next(endless) for _ in range(4)} == {json.loads(line)["id"] for line in Path(path).read_text().splitlines()}
