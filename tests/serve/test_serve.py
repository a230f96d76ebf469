"""What `visionzip serve` does apart from the engine: the command it starts, the directory, the checks of requests, the plugin."""

import argparse
import base64
import io
import json
import os
import shlex
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, cli, save
from visionzip.serving import launch, vllm_plugin
from visionzip.serving.bare import Budgets, family_of, family_of_config, stored_config
from visionzip.serving.items import batch_items, pack_budget, split_items, unpack_budget
from visionzip.serving.requests import RequestError, check_request

BUDGET = ZipConfig(dominant=6, contextual=2)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    place = tmp_path_factory.mktemp("serve") / "merged"
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, BUDGET)
    save(model, place, "merged")
    return place


@pytest.fixture
def projector(tmp_path, merged):
    base = tmp_path / "base"
    model, processor = tiny_llava(), tiny_processor()
    model.save_pretrained(base)
    processor.save_pretrained(base)
    model.config._name_or_path = str(base)
    attach(model, processor, BUDGET)
    return save(model, tmp_path / "projector")


@pytest.fixture
def vllm(monkeypatch):
    """As if vLLM were installed, with the plugin."""
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    monkeypatch.setattr(launch, "entry_points", lambda **selected: [object()])
    monkeypatch.setattr(launch, "version", lambda name: "1.0")


def printed(capsys, *arguments):
    assert cli.main(["serve", *map(str, arguments), "--print"]) == 0
    command, curl = capsys.readouterr().out.splitlines()
    return shlex.split(command), shlex.split(curl)


def option(command, name):
    return command[command.index(name) + 1]


def test_a_merged_directory_is_served_as_it_is(vllm, merged, capsys):
    command, curl = printed(capsys, merged)
    ours = [sys.executable, "-m", "visionzip.serving.vllm_main"]
    assert command[:6] == [*ours, "vllm.entrypoints.cli.main", "serve", str(merged)]
    assert json.loads(option(command, "--hf-overrides")) == {"architectures": [vllm_plugin.ARCHITECTURE]}
    assert option(command, "--host") == "127.0.0.1"
    assert option(command, "--dtype") == "float32"
    assert option(command, "--allowed-media-domains") == "nothing.invalid"
    assert option(command, "--served-model-name") == "merged"
    assert "--trust-request-mm-kwargs" not in command
    body = json.loads(curl[-1])
    assert curl[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert (
        check_request(body, "merged", 1)["messages"][0]["content"][1]["text"]
        == body["messages"][0]["content"][1]["text"]
    )


def test_the_build_for_cpus_is_started_by_its_module(vllm, merged, monkeypatch, capsys):
    def missing(name):
        raise launch.PackageNotFoundError(name)

    monkeypatch.setattr(launch, "version", missing)
    assert printed(capsys, merged)[0][3:6] == ["vllm.entrypoints.openai.api_server", "--model", str(merged)]


def test_options_that_are_vllms_are_handed_on_and_win(vllm, merged, capsys):
    command, _ = printed(
        capsys,
        merged,
        "--port",
        9,
        "--max-model-len",
        512,
        "--enforce-eager",
        "--allowed-media-domains",
        "a.org",
        "--request-budgets",
        "--name",
        "zip",
    )
    assert command[-5:] == ["--max-model-len", "512", "--enforce-eager", "--allowed-media-domains", "a.org"]
    assert command.count("--allowed-media-domains") == 1
    assert {"--trust-request-mm-kwargs", "zip", "9"} <= set(command)


def test_another_budget_goes_into_the_config_that_vllm_reads(vllm, merged, capsys):
    command, _ = printed(capsys, merged, "--budget", "4+1")
    assert json.loads(option(command, "--hf-overrides"))["visionzip"] == {"dominant": 4, "contextual": 1}


def test_what_is_not_merged_yet_is_written_as_a_merged_directory(vllm, projector, tmp_path, capsys):
    kept = tmp_path / "kept"
    command, _ = printed(capsys, projector, "--merged", kept, "--budget", "4+1")
    assert command[5] == str(kept)
    stored = json.loads((kept / "config.json").read_text())
    assert (stored["visionzip"]["dominant"], stored["visionzip"]["contextual"]) == (4, 1)
    temporary = printed(capsys, projector)[0][5]
    assert not launch.Path(temporary).exists(), "removed at the end"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "all"], "this command serves compressed models"),
        (["--budget", "x"], "'x' is not a budget"),
        (["--engine", "transformers", "--max-model-len", "9"], "does not know --max-model-len"),
    ],
)
def test_what_can_not_be_served_is_one_sentence(vllm, merged, arguments, message, capsys):
    assert cli.main(["serve", str(merged), *arguments, "--print"]) == 2
    assert message in capsys.readouterr().err


def test_a_family_that_was_not_compared_is_refused(vllm, merged, tmp_path, capsys):
    import shutil

    place = shutil.copytree(merged, tmp_path / "other")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_5_vl"}))
    assert cli.main(["serve", str(place), "--print"]) == 2
    assert "qwen2_5_vl have not been compared" in capsys.readouterr().err


def test_a_missing_engine_is_named_with_what_to_install(merged, monkeypatch, capsys):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert cli.main(["serve", str(merged)]) == 2
    assert "pip install vllm" in capsys.readouterr().err
    assert cli.main(["serve", str(merged), "--engine", "transformers"]) == 2
    assert "transformers[serving]" in capsys.readouterr().err
    monkeypatch.setattr(launch, "find_spec", lambda name: object())
    monkeypatch.setattr(launch, "entry_points", lambda **selected: [])
    assert cli.main(["serve", str(merged)]) == 2
    assert "install it again" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["merged", "safetensors"])
def test_original_positions_are_refused_before_the_engine_starts(vllm, tmp_path, capsys, form):
    model, processor = tiny_llava(), tiny_processor()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    attach(model, processor, BUDGET.model_copy(update={"positions": "original"}))
    save(model, tmp_path / form, form)
    arguments = ["--base", str(tmp_path / "base")] if form == "safetensors" else []
    assert cli.main(["serve", str(tmp_path / form), *arguments, "--print"]) == 2
    assert "--engine transformers" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(ValueError, match="numbers visual tokens consecutively"):
        Budgets(processor, attached(model).family, attached(model).config)


def test_the_plugin_registers_one_class_once(monkeypatch):
    registered = {}
    registry = types.SimpleNamespace(get_supported_archs=registered.keys, register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    for _ in range(2):
        vllm_plugin.register()
    assert registered == {vllm_plugin.ARCHITECTURE: "visionzip.serving.vllm_model:CompressedForConditionalGeneration"}


@pytest.mark.parametrize("options", [[], ["--allowed-local-media-path", "/srv/images"]])
def test_vllms_server_is_started_so_that_large_images_and_files_are_refused_in_its_own_words(tmp_path, options):
    (tmp_path / "server.py").write_text(
        "import json, os, sys; from PIL import Image\n"
        "print(json.dumps([__name__, sys.argv[1:], Image.MAX_IMAGE_PIXELS, os.environ['VLLM_MAX_IMAGE_PIXELS'], "
        "os.path.isdir(sys.argv[-1]) and os.listdir(sys.argv[-1])]))"
    )
    command = [sys.executable, "-m", "visionzip.serving.vllm_main", "server", "--port", "9", *options]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    found = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    name, arguments, pillow, limit, inside = json.loads(found.stdout)
    assert (name, pillow, limit) == ("__main__", None, "100000000")
    assert arguments[:3] == ["--port", "9", "--allowed-local-media-path"]
    assert len(arguments) == 4
    assert arguments[3:] == options[1:] if options else inside == []


def test_the_server_is_announced_when_it_answers_and_its_exit_code_is_ours(capfd, tmp_path):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    assert launch.watch([sys.executable, "-c", "import time; time.sleep(1); raise SystemExit(3)"], address, "zip") == 3
    assert f"zip is served at {address}" in capfd.readouterr().out
    server.shutdown()
    assert not launch.answers(address)
    assert launch.watch([sys.executable, "-c", "raise SystemExit(4)"], address, "zip") == 4
    assert "is served" not in capfd.readouterr().out


# families without a head, and processors with budgets of their own


def test_an_inner_model_gives_the_same_visual_tokens_as_the_whole_one(model, processor):
    inputs = tiny_processor()(text=["<image>"], images=[make_image()], return_tensors="pt")
    bare = family_of(model.model)
    found = bare.project(bare.compress(BUDGET, pixel_values=inputs["pixel_values"]))
    attach(model, processor, BUDGET)
    expected = attached(model).project(attached(model).compress(pixel_values=inputs["pixel_values"]))
    assert torch.equal(found[0], expected[0])


def test_each_budget_has_a_processor_and_none_changes_the_others(model):
    stock = tiny_processor()
    budgets = Budgets(stock, family_of_config(model.config), BUDGET)
    written = [
        made(text=["<image>"], images=[make_image()], return_tensors="pt")["input_ids"].eq(4).sum().item()
        for made in (stock, budgets.processor(), budgets.processor("3+1"), budgets.processor(8), budgets.processor())
    ]
    assert written == [16, 8, 4, 8, 8]
    assert budgets.processor("3+1") is budgets.processor("3+1")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (9, "more than this server keeps"),
        ("all", "more than"),
        ("x", "not a budget"),
        ([1], "not a budget"),
        (True, "not a budget"),
        ("1+0", None),
    ],
)
def test_budgets_of_requests(asked, message, model):
    budgets = Budgets(tiny_processor(), family_of_config(model.config), BUDGET)
    if message is None:
        assert budgets.config(asked).dominant == 1
        return
    with pytest.raises(ValueError, match=message):
        budgets.config(asked)


def test_a_request_may_name_any_budget_that_the_projector_is_trained_for(model):
    own = ZipConfig(dominant=6, contextual=2, budgets=[4, 8, 12])
    budgets = Budgets(tiny_processor(), family_of_config(model.config), own)
    assert sum(budgets.family.budget(budgets.largest)) == 12
    assert sum(budgets.family.budget(budgets.config(12))) == 12
    assert budgets.config(None) == own
    with pytest.raises(ValueError, match="more than this server keeps"):
        budgets.config(13)


def test_a_config_without_a_budget_is_one_sentence(model):
    with pytest.raises(ValueError, match="does not say which visual tokens"):
        stored_config(model.config)


@pytest.mark.parametrize(
    "config", [BUDGET, ZipConfig(dominant=3, contextual=0), ZipConfig(dominant=0.25, contextual=0.1)]
)
def test_a_budget_survives_being_packed(config):
    assert unpack_budget(pack_budget(config, 12), BUDGET) == (config, 12)


def test_images_of_a_batch_are_split_and_joined_again():
    tiles = [torch.rand(1, count, 3, 2, 2) for count in (2, 3)]
    items = split_items({"pixel_values": tiles, "image_sizes": torch.tensor([[1, 2], [3, 4]])}, [1, 1])
    batch = batch_items(items)
    assert batch["pixel_values"].shape == (2, 3, 3, 2, 2)
    assert torch.equal(batch["pixel_values"][0, :2], tiles[0][0])
    assert not batch["pixel_values"][0, 2].any()
    assert batch["image_sizes"].tolist() == [[1, 2], [3, 4]]
    flat = split_items(
        {"pixel_values": torch.arange(12).view(6, 2), "grid": torch.tensor([[1, 2, 2], [1, 1, 2]])}, [4, 2]
    )
    assert flat[1]["pixel_values"].tolist() == [[8, 9], [10, 11]]
    assert flat[1]["grid"].tolist() == [[1, 1, 2]]
    with pytest.raises(ValueError, match="has 5 rows"):
        split_items({"pixel_values": torch.zeros(5, 2)}, [4, 2])


# requests


def message(*urls, text="what is this"):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": "zip", "messages": [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]}


def data_url(image=None, content=None, kind="png"):
    if content is None:
        file = io.BytesIO()
        image.save(file, kind)
        content = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def test_a_good_request_is_handed_on_with_upright_rgb_images():
    body = check_request(message(data_url(make_image(size=(1, 1)).convert("RGBA"))), "zip", 1)
    from PIL import Image

    url = body["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (image.mode, min(image.size)) == ("RGB", 8)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ([], 400, "not a JSON object"),
        ({"messages": []}, 400, "names no model"),
        ({**message(), "model": "other"}, 404, "no model 'other'"),
        ({"model": "zip", "messages": []}, 400, "at least one message"),
        ({**message(), "chat_template": "{{ 1 }}"}, 400, "does not know chat_template"),
        ({"model": "zip", "messages": [{"role": "tool", "content": "x"}]}, 400, "a role"),
        (message("file:///etc/passwd"), 400, "files and other addresses are not read"),
        (message("https://example.org/a.png"), 400, "files and other addresses are not read"),
        (message("/etc/passwd"), 400, "files and other addresses are not read"),
        (message("data:image/png;base64,%%%"), 400, "can't be read"),
        (message("data:image/png,abc"), 400, "not base64"),
        (message(data_url(content=b"just text")), 400, "unreadable image"),
        (message(data_url(content=b"")), 400, "empty file"),
        (message(data_url(make_image(size=(101, 100)))), 400, "image too large"),
        (message(*[data_url(make_image())] * 3), 400, "more than 2 images"),
        ({"model": "zip", "messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, 400, "type 'video_url'"),
    ],
)  # fmt: skip
def test_a_bad_request_says_what_is_wrong(body, status, words):
    with pytest.raises(RequestError, match=words) as found:
        check_request(body, "zip", 2, max_pixels=10_000)
    assert found.value.status == status


def test_arguments_reach_the_loading_of_a_model(projector, tmp_path):
    arguments = argparse.Namespace(base=None, force=False, dtype="float32", budget="3+1", merged=None)
    launch.write_merged(str(projector), tmp_path / "out", arguments)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["visionzip"]["dominant"] == 3
