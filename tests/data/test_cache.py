"""The token cache: same tokens as from pixels, written by many, repaired where damaged, refused where stale."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from data.cache import CacheError, check_identity, claim, identity
from data.cache.build import fill
from data.cache.identity import cache_at
from data.cache.reader import VISUAL, CachedTokens
from data.cache.shards import Damaged, ForeignShard, Shard, Writer, key_of
from data.cache.store import Store
from data.commands.cache import main
from data.config import DataConfig
from data.dataset import build_dataset
from data.images import PixelImages
from data.partial import load_without
from data.sample import Media, Reject, Rejection, Sample
from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached

ROOT = Path(__file__).parents[2]
BUDGET = ZipConfig(dominant=5, contextual=2)
IMAGES = 6


@pytest.fixture
def place(tmp_path):
    """A JSON file of seven records about six files, of which two hold the same bytes; a model directory."""
    for number in range(IMAGES - 1):
        make_image(number).save(tmp_path / f"{number}.png")
    shutil.copy(tmp_path / "0.png", tmp_path / f"{IMAGES - 1}.png")
    records = [
        {"id": f"r{number}", "image": f"{number % IMAGES}.png",
         "conversations": [{"from": "human", "value": "<image>\nwhat is this"}, {"from": "gpt", "value": "a red circle"}]}
        for number in range(IMAGES + 1)
    ]  # fmt: skip
    (tmp_path / "records.json").write_text(json.dumps(records))
    tiny_llava().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    return tmp_path


def data_config(place, **changes) -> DataConfig:
    return DataConfig(
        sources=[{"path": str(place / "records.json")}], template="plain", cache_dir=str(place / "index"), **changes
    )


def make(place, folder, *, zip_config=BUDGET, dtype="float32", shard_bytes=1 << 20, process=0, processes=1):
    """One process's share of the cache; returns its builder."""
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, zip_config)
    data = data_config(place)
    claim(folder, identity(model, processor, zip_config, data, dtype))
    return fill(
        folder, attached(model), processor, data, process=process, processes=processes, device=torch.device("cpu"),
        dtype=getattr(torch, dtype), batch=2, workers=0, shard_bytes=shard_bytes,
    )[0]  # fmt: skip


def compressed(place, name: str) -> torch.Tensor:
    model, processor = tiny_llava(), tiny_processor()
    attachment = attached(attach(model, processor, BUDGET))
    pixels = PixelImages(data_config(place), processor)(sample(place, name))
    return attachment.compress(**pixels.inputs)[0]


def sample(place, *names: str) -> Sample:
    return Sample("s", [], [Media("image", str(place / name)) for name in names])


@pytest.fixture
def cache(place):
    folder = place / "cache"
    make(place, folder)
    return folder


def test_tokens_are_those_of_the_encoder(place, cache):
    cached = CachedTokens(cache, frames=8)
    for number in range(IMAGES):
        found = cached(sample(place, f"{number}.png"))
        assert torch.allclose(found.inputs[VISUAL][0], compressed(place, f"{number}.png"), atol=1e-6)
        assert found.placeholders == ["<image>" * 7]
    two = cached(sample(place, "1.png", "2.png"))
    assert len(two.inputs[VISUAL]) == len(two.placeholders) == 2
    assert not torch.equal(two.inputs[VISUAL][0], two.inputs[VISUAL][1])


def test_equal_files_are_one_entry(cache):
    assert len(Store(cache, cache_at(cache))) == IMAGES - 1 + 1  # and the blank image


def test_the_second_time_nothing_is_computed(place, cache):
    again = make(place, cache)
    assert (len(again.written), again.reused) == (0, IMAGES)


def test_an_image_that_is_gone_is_found_by_name_and_a_changed_one_is_not(place, cache):
    before = compressed(place, "1.png")
    (place / "1.png").unlink()
    cached = CachedTokens(cache, frames=8)
    assert torch.allclose(cached(sample(place, "1.png")).inputs[VISUAL][0], before, atol=1e-6)
    make_image(77, (64, 32)).save(place / "1.png")
    with pytest.raises(Reject, match="not in the cache"):
        cached(sample(place, "1.png"))
    make(place, cache)
    after = CachedTokens(cache, frames=8)(sample(place, "1.png")).inputs[VISUAL][0]
    assert torch.allclose(after, compressed(place, "1.png"), atol=1e-6)
    assert not torch.allclose(after, before, atol=1e-3)


def test_an_image_elsewhere_is_found_by_content(place, cache):
    shutil.copy(place / "2.png", place / "moved.png")
    found = CachedTokens(cache, frames=8)(sample(place, "moved.png")).inputs[VISUAL][0]
    assert torch.allclose(found, compressed(place, "2.png"), atol=1e-6)


def test_half_the_bytes_in_bfloat16(place, cache):
    make(place, place / "half", dtype="bfloat16")
    found = CachedTokens(place / "half", frames=8)(sample(place, "3.png")).inputs[VISUAL][0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, compressed(place, "3.png").bfloat16())


def write_share(place, folder, process, processes):
    torch.set_num_threads(1)
    make(place, folder, process=process, processes=processes)


def test_many_processes_write_one_cache(place):
    folder = place / "shared"
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=write_share, args=(place, folder, number, 3)) for number in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0
    cached = CachedTokens(folder, frames=8)
    for number in range(IMAGES):
        found = cached(sample(place, f"{number}.png")).inputs[VISUAL][0]
        assert torch.allclose(found, compressed(place, f"{number}.png"), atol=1e-6)
    assert make(place, folder).written == set()


def test_what_a_killed_writer_had_not_finished_is_not_there(place):
    folder = place / "killed"
    folder.mkdir()
    writer = Writer(folder)
    writer.add(key_of(b"x"), {}, {"t": torch.ones(3)})
    writer._file.flush()
    assert len(Store(folder, cache_at(folder))) == 0
    writer.close()
    assert len(Store(folder, cache_at(folder))) == 1


@pytest.mark.parametrize("where", ["entry", "table", "tail", "cut short", "empty"])
def test_damage_is_noticed_and_repaired(place, where):
    folder = place / "damaged"
    make(place, folder, shard_bytes=1)  # every entry a shard of its own
    key = Store(folder, cache_at(folder)).named(key_of(b"image", str(place / "4.png").encode()))[0]
    shard = next(path for path in folder.glob("*.tokens") if holds(path, key))
    raw = bytearray(shard.read_bytes())
    if where == "entry":
        raw[70] ^= 1
    elif where == "table":
        raw[-200] ^= 1
    elif where == "tail":
        raw[-3] ^= 1
    shard.write_bytes({"cut short": raw[: len(raw) // 2], "empty": b""}.get(where, raw))

    with pytest.raises(Reject, match=r"damaged cache|not in the cache"):
        CachedTokens(folder, frames=8)(sample(place, "4.png"))
    assert len(make(place, folder).written) == 1
    found = CachedTokens(folder, frames=8)(sample(place, "4.png")).inputs[VISUAL][0]
    assert torch.allclose(found, compressed(place, "4.png"), atol=1e-6)


def holds(path, key) -> bool:
    return any((row["hi"], row["lo"]) == key for row in Shard(path).rows)


def test_every_flipped_bit_of_a_shard_is_noticed(tmp_path):
    writer = Writer(tmp_path)
    writer.add(key_of(b"a"), {"a": 1}, {"t": torch.arange(8.0)})
    writer.close()
    (shard,) = tmp_path.glob("*.tokens")
    good = shard.read_bytes()
    for byte in range(len(good)):
        bad = bytearray(good)
        bad[byte] ^= 4
        shard.write_bytes(bad)
        for index in tmp_path.glob("index-*"):
            index.unlink()
        store = Store(tmp_path)
        try:
            entry = store.get(key_of(b"a"))
        except Damaged:
            continue
        assert entry is None or (torch.equal(entry[1]["t"], torch.arange(8.0))), byte


def test_every_flipped_bit_of_the_index_is_noticed_and_the_index_made_again(place, cache, caplog):
    (index,) = cache.glob("index-*")
    good, store = index.read_bytes(), Store(cache, cache_at(cache))
    keys = [(int(row["hi"]), int(row["lo"])) for row in store.rows]
    for byte in [*range(0, len(good), 7), len(good) - 1, "empty", "cut short"]:
        bad = bytearray(good)
        if isinstance(byte, int):
            bad[byte] ^= 4
        else:
            del bad[0 if byte == "empty" else -1 :]
        index.write_bytes(bad)
        caplog.clear()
        store = Store(cache, cache_at(cache))
        assert [(int(row["hi"]), int(row["lo"])) for row in store.rows] == keys, byte
        assert all(store.get(key) is not None for key in keys)
        assert len(caplog.records) == 1, byte
        assert "rebuilding it from the shards" in caplog.text
        assert index.read_bytes() == good
    caplog.clear()
    Store(cache, cache_at(cache))
    assert caplog.text == ""


@pytest.mark.parametrize("change", [{"zip_config": ZipConfig(dominant=4, contextual=3)}, {"dtype": "bfloat16"}])
def test_a_shard_of_another_cache_is_refused_by_name(place, cache, change):
    """With the same number of tokens: nothing but what the shard says of itself tells it from the cache's own."""
    make(place, place / "other", **change)
    (foreign,) = (place / "other").glob("*.tokens")
    # Younger than the cache's own, so that its entries would be the ones that count.
    lain = shutil.copy(foreign, cache / f"9{foreign.name}")
    for use in (lambda: CachedTokens(cache, frames=8), lambda: make(place, cache)):
        with pytest.raises(ForeignShard) as caught:
            use()
        assert lain in str(caught.value) if isinstance(lain, str) else lain.name in str(caught.value)
        there = "zip.dominant=4" if "zip_config" in change else "dtype=bfloat16"
        assert there in str(caught.value).partition("this one contains")[0]
        assert "zip.dominant=5" in str(caught.value).partition("this one contains")[2]
    (cache / f"9{foreign.name}").unlink()
    assert make(place, cache).written == set()


def test_a_shard_replaced_by_one_of_another_cache_under_its_own_name_is_refused(place, cache):
    """After the index was made: names and sizes are what they were."""
    make(place, place / "other", zip_config=ZipConfig(dominant=4, contextual=3))
    (foreign,), (own,) = (place / "other").glob("*.tokens"), cache.glob("*.tokens")
    shutil.copy(foreign, own)
    with pytest.raises(ForeignShard, match=own.name):
        CachedTokens(cache, frames=8)


def test_an_index_is_of_the_shards_there_are_whatever_their_names_and_sizes(tmp_path):
    for name, key in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        writer = Writer(tmp_path / name)
        writer.add((key, key), {}, {"t": torch.full((3,), float(key))})
        writer.close()
    (first,), (second,) = (tmp_path / "a").glob("*.tokens"), (tmp_path / "b").glob("*.tokens")
    assert (1, 1) in Store(tmp_path / "a")
    shutil.copy(second, first)
    store = Store(tmp_path / "a")
    assert (1, 1) not in store
    assert store.get((2, 2))[1]["t"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("damage", ['{"format"', "[]", '"x"', '{"format": "visionzip-tokens/2"}', "\xff"])
def test_a_damaged_manifest_is_one_message(place, cache, damage):
    (cache / "cache.json").write_bytes(damage.encode("latin-1"))
    with pytest.raises(CacheError, match="is damaged"):
        make(place, cache)


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing_half_written(place, capsys):
    """With a limit on the size of files, which the kernel answers as it does a full disk: in the middle of a write."""
    given = write_run(place)
    assert main([*given, f"data.cache={place / 'whole'}"]) == 0
    sizes = {path.suffix: path.stat().st_size for path in (place / "whole").iterdir()}
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from data.commands.cache import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[2:]))"
    )
    for limit, where in ((sizes[".json"] - 1, r"cache\.json"), (sizes[".tokens"] - 1, r"\S+\.tokens")):
        done = subprocess.run(
            [sys.executable, "-c", script, str(limit), *given], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 74, done.stderr
        assert "Traceback" not in done.stderr
        said = rf"run ended with exit code 74: .*/tokens/{where} could not be written: File too large"
        assert re.search(said, done.stderr), done.stderr
        left = {path.name for path in (place / "tokens").iterdir()} - {"cache.json"}
        assert not [name for name in left if name.endswith((".part", ".tokens"))]
        # So that the next limit is met by the shard and not by the manifest, whatever their sizes.
        shutil.copy(place / "whole" / "cache.json", place / "tokens")
    capsys.readouterr()
    assert main(given) == 0
    assert f"{IMAGES} images, {IMAGES} computed" in capsys.readouterr().out


def test_what_a_killed_writer_left_is_removed_by_the_next(place, cache):
    script = (
        "import os, sys; from pathlib import Path; from data.cache.shards import Writer\n"
        "import torch\n"
        "writer = Writer(Path(sys.argv[1])); writer.add((1, 2), {}, {'t': torch.ones(3)}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(cache)], check=False, cwd=ROOT)
    assert len(list(cache.glob(".*.part"))) == 1
    make_image(99).save(place / "3.png")
    make(place, cache)
    assert list(cache.glob(".*.part")) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.path=/nonexistent", "model.path: there is nothing at /nonexistent"),
        ("model.dtype=nope", "model.dtype"),
        ("zip.dominant=5000", "5000"),
        ("data.sources.0.path=/nowhere/a.json", "there is no file /nowhere/a.json"),
        ("data.cache=/proc/x", "/proc/x"),
    ],
)
def test_a_mistake_is_one_clear_line(place, capsys, override, says):
    assert main([*write_run(place), override]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert says in "\n".join(lines)
    assert len(lines) <= 2  # how many mistakes there are, and the mistake


def test_no_images_at_once_is_a_mistake_too(place, capsys):
    for options in (["--batch", "0"], ["--workers", "-1"], ["--batch", "many"]):
        with pytest.raises(SystemExit) as ended:
            main([*write_run(place), *options])
        assert ended.value.code == 2
        assert f"argument {options[0]}: " in capsys.readouterr().err


def write_run(place) -> list[str]:
    """A config file; the arguments that fill the cache `tokens` with it."""
    config = {"model": {"path": str(place / "model"), "dtype": "float32"}, "zip": BUDGET.model_dump(),
              "data": data_config(place).model_dump(mode="json")}  # fmt: skip
    (place / "run.yaml").write_text(json.dumps(config))
    return ["--config", str(place / "run.yaml"), "--workers", "0", f"data.cache={place / 'tokens'}"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"zip_config": ZipConfig(dominant=6, contextual=2)}, "zip.dominant: 5 there, 6 here"),
        ({"dtype": "bfloat16"}, "dtype: float32"),
    ],
)
def test_a_stale_cache_is_refused_by_name(place, cache, change, says):
    with pytest.raises(CacheError, match=says):
        make(place, cache, **change)


def test_another_encoder_or_preprocessing_is_refused_by_name(place, cache):
    model, processor = tiny_llava(seed=1), tiny_processor()
    attach(model, processor, BUDGET)
    with pytest.raises(CacheError, match="encoder: "):
        check_identity(cache, identity(model, processor, BUDGET, data_config(place), "float32"))
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, BUDGET)
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    with pytest.raises(CacheError, match=r"preprocessing.image_mean: \[0.48"):
        check_identity(cache, identity(model, processor, BUDGET, data_config(place), "float32"))
    with pytest.raises(CacheError, match="contains no token cache"):
        check_identity(place / "nowhere", {})


def test_workers_open_the_store_for_themselves(place, cache):
    cached = CachedTokens(cache, frames=8)
    cached(sample(place, "0.png"))
    data = pickle.dumps(cached)
    assert len(data) < 1000
    again = pickle.loads(data)(sample(place, "0.png"))
    assert torch.equal(again.inputs[VISUAL][0], cached(sample(place, "0.png")).inputs[VISUAL][0])


def test_what_a_reader_holds_does_not_grow_with_the_cache(tmp_path):
    """Rows and names are looked up in the files: counted are the bytes that Python and numpy hold of them."""
    entries, held = 4000, {}
    for count in (entries // 40, entries):
        folder = tmp_path / str(count)
        folder.mkdir()
        writer = Writer(folder)
        for number in range(count):
            key = key_of(str(number).encode())
            writer.add(key, None, {"a": torch.zeros(1)})
            writer.name(key, key, 1, 1)
        writer.close()
        Store(folder, cache_at(folder))  # makes the index
        tracemalloc.start()
        store = Store(folder, cache_at(folder))
        assert store.get(key_of(b"7")) is not None
        held[count] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del store
    assert held[entries] < held[entries // 40] + entries  # a row alone has 32 bytes


def test_command_line(place, capsys):
    config = {"model": {"path": str(place / "model"), "dtype": "float32"}, "zip": BUDGET.model_dump(),
              "data": data_config(place).model_dump(mode="json")}  # fmt: skip
    (place / "run.yaml").write_text(json.dumps(config))
    assert main(["--config", str(place / "run.yaml")]) == 2
    assert "data.cache=FOLDER" in capsys.readouterr().err
    given = ["--config", str(place / "run.yaml"), "--workers", "0", f"data.cache={place / 'cli'}"]
    assert main(given) == 0
    assert f"{IMAGES} images, {IMAGES} computed" in capsys.readouterr().out
    assert main(given) == 0
    assert f"0 computed, {IMAGES} there already" in capsys.readouterr().out
    assert main([*given, "zip.dominant=4"]) == 2
    assert "zip.dominant: 5 there, 4 here" in capsys.readouterr().err


def test_items_of_a_dataset_are_the_same_but_for_the_images(place, cache):
    processor = tiny_processor()
    attach(tiny_llava(), processor, BUDGET)
    pixels = build_dataset(data_config(place), processor, 0)
    cached = build_dataset(data_config(place, cache=str(cache)), processor, 0)
    for index in range(len(pixels)):
        a, b = pixels[index], cached[index]
        assert not isinstance(a, Rejection)
        assert not isinstance(b, Rejection)
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])
        assert "pixel_values" not in b
    batch = cached.collator()([cached[0], cached[1]])
    assert [len(tokens) for tokens in batch[VISUAL]] == [7, 7]


def test_a_model_is_loaded_without_one_of_its_halves(place):
    whole = tiny_llava().state_dict()
    for without, gone in (("encoder", "model.vision_tower."), ("llm", "model.language_model.")):
        model = load_without(str(place / "model"), [without])
        loaded = dict(model.named_parameters())
        assert loaded
        assert not any(name.startswith(gone) for name in loaded)
        assert "model.multi_modal_projector.linear_1.weight" in loaded
        assert all(torch.equal(value, whole[name]) for name, value in loaded.items())
        assert type(model) is type(tiny_llava())
    model = attach(load_without(str(place / "model"), ["encoder"]), tiny_processor(), BUDGET)
    with pytest.raises(RuntimeError, match="loaded without its weights"):
        attached(model).compress(pixel_values=torch.zeros(1, 3, 32, 32))
