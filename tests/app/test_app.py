"""The app without a browser: what it can do, and what its server lets through. `make test-browser` looks at the page itself."""

import io
import json
import socket

import httpx
import pytest
import torch
from PIL import Image

from tests.tiny import picture, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, detach
from visionzip.analysis.ask import ask
from visionzip.app.looker import Looker, painted, patch_at
from visionzip.app.ui import build, refuse_taken, serve
from visionzip.cli import main

BUDGET = ZipConfig(dominant=5, contextual=3)


@pytest.fixture
def looker(model, processor):
    return Looker(attach(model, processor, BUDGET), processor)


@pytest.fixture
def look(looker, tmp_path):
    picture(0).save(tmp_path / "a.png")
    return looker.look(tmp_path / "a.png")


def answer(config, question="what is this", picture_=None):
    model, processor = tiny_llava(), tiny_processor()
    if config is not None:
        attach(model, processor, config)
    return ask(model, processor, picture_ or picture(0), question, max_new_tokens=6)


def test_both_answers_are_the_models_own(looker, look):
    pair = looker.answers(look, "what is this", BUDGET, length=6)
    assert pair.full.text == answer(None).text
    assert pair.compressed.text == answer(BUDGET).text
    assert (pair.full_tokens, pair.tokens) == (16, 8)
    assert pair.full.prompt_tokens - pair.compressed.prompt_tokens == 8
    assert 0 < pair.compressed.first <= pair.compressed.seconds
    assert attached(looker.model).config == BUDGET


def test_another_budget_is_asked_with(looker, look):
    config = looker.with_budget(9, 0, "divprune", "none")
    pair = looker.answers(look, "what is this", config, length=6)
    assert pair.compressed.text == answer(config).text
    assert pair.tokens == 9
    assert attached(looker.model).config == BUDGET


def test_patches_kept_by_hand_are_what_the_model_is_given(looker, look):
    best = look.trace.tiles[0].kept[1:] - 1
    same = looker.answers(look, "what is this", BUDGET, (0, best), length=6)
    assert same.compressed.text == answer(BUDGET).text  # painting what the selector takes changes nothing
    others = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    pair = looker.answers(look, "what is this", BUDGET, (0, others), length=6)
    assert pair.tokens == 1 + 7 + 3
    tile = looker.by_hand(look.trace.tiles[0], others, look.trace.tiles[0])
    assert tile.kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert len(tile.targets) == 3


@pytest.mark.parametrize(
    ("question", "by_hand", "message"),
    [("  ", None, "ask something"), ("what", (0, torch.tensor([], dtype=torch.long)), "no patch is painted")],
)
def test_what_can_not_be_asked(looker, look, question, by_hand, message):
    with pytest.raises(ValueError, match=message):
        looker.answers(look, question, BUDGET, by_hand)


def test_the_model_is_as_it_was_after_a_failure(looker, look, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(looker.model, "generate", fail)
    looker.warm = True
    with pytest.raises(RuntimeError, match="out of memory"):
        looker.answers(look, "what is this", ZipConfig(dominant=9, contextual=1))
    assert attached(looker.model).config == BUDGET


def test_a_picture_that_is_none(looker, tmp_path):
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(ValueError, match="no picture of a known format"):
        looker.look(tmp_path / "a.png")


def test_paint_to_patches():
    layer = Image.new("RGBA", (80, 80))
    layer.paste((213, 94, 0, 153), (0, 0, 40, 20))  # patches 0 and 1 of a 4 × 4 grid
    layer.paste((213, 94, 0, 153), (60, 60, 64, 64))  # a speck in patch 15: too little
    assert painted([layer], (4, 4)).tolist() == [0, 1]
    assert painted([], (4, 4)).tolist() == []


def test_points_to_patches(look):
    tile = look.trace.tiles[0]
    assert [patch_at(tile, (400, 400), x, y) for x, y in ((0, 0), (399, 0), (150, 250), (400, 400))] == [0, 3, 9, 15]


def test_needs_a_budget(model, processor):
    with pytest.raises(ValueError, match="nothing is attached"):
        Looker(detach(model), processor)


# ---------------------------------------------------------------- the server


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    picture(0).save(folder / "a.png")
    model, processor = tiny_llava(), tiny_processor()
    looker = Looker(attach(model, processor, BUDGET), processor)
    found, page = serve(build(looker, "tiny", str(folder / "a.png")), port=free_port(), block=False)
    yield found.rstrip("/")
    page.close()


@pytest.fixture
def client():
    with httpx.Client(timeout=60, trust_env=False) as client:
        yield client


def call(client, address, name, data, session="s"):
    """One event of the page, as its own script sends it; returns the outputs' values."""
    config = client.get(f"{address}/config").json()
    number = next(place for place, entry in enumerate(config["dependencies"]) if entry["api_name"] == name)
    sent = client.post(
        f"{address}/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": session}
    )
    sent.raise_for_status()
    with client.stream("GET", f"{address}/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line[5:]) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("the stream ended without an answer")


def upload(client, address, data, name="a.png"):
    return client.post(f"{address}/gradio_api/upload", files={"files": (name, data)})


def png(seed=0):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def test_upload_budget_ask(client, address):
    (path,) = upload(client, address, png()).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    opened = call(client, address, "open", [file, "visionzip", "add"])
    assert opened["success"], opened
    words = [value for value in opened["output"]["data"] if isinstance(value, str)]
    assert any("8 of 16 visual tokens" in text for text in words)
    moved = call(client, address, "budget", [None, 0, 9, 2, "visionzip", "add"])
    assert moved["output"]["data"][3].startswith("**11 of 16 visual tokens.**")
    drawn = client.get(moved["output"]["data"][1]["url"])
    assert Image.open(io.BytesIO(drawn.content)).size == (420, 420)
    asked = call(
        client, address, "ask", [None, 0, "what is this", 6, "chosen by the selector", None, 5, 3, "visionzip", "add"]
    )
    full, few, times = asked["output"]["data"]
    assert (full, few) == (answer(None).text, answer(BUDGET).text)
    assert [row[1] for row in times["data"]] == [16, 8]


def test_a_bad_picture_gets_one_clear_message(client, address):
    (path,) = upload(client, address, b"no picture").json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answered = call(client, address, "open", [file, "visionzip", "add"], session="bad")
    assert not answered["success"]
    assert "no picture of a known format" in answered["output"]["error"]


def test_serves_no_file_but_its_own(client, address, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("/etc/passwd", f"{tmp_path}/secret.txt", "pyproject.toml", "README.md", "../etc/passwd"):
        for form in (f"/gradio_api/file={name}", f"/file={name}"):
            assert client.get(address + form).status_code in (403, 404), form
    stolen = {"path": f"{tmp_path}/secret.txt", "meta": {"_type": "gradio.FileData"}}
    assert not call(client, address, "open", [stolen, "visionzip", "add"], session="thief")["success"]


def test_limits_uploads(client, address):
    assert upload(client, address, bytes(21 * 2**20)).status_code == 413
    assert upload(client, address, png()).status_code == 200


def test_only_this_machine_can_reach_it(address):
    assert address.startswith("http://127.0.0.1:")
    port = int(address.rsplit(":", 1)[1])
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))  # taken too if it listened on all addresses


def test_a_port_in_use(model_folder_for_app, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", str(model_folder_for_app), "--port", str(port)]) == 2
    assert f"port {port} on 127.0.0.1 can't be used" in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not exist"):
        refuse_taken("127.0.0.1", 99999)


@pytest.fixture(scope="module")
def model_folder_for_app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llava().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def test_a_picture_that_does_not_exist(model_folder_for_app, capsys):
    assert main(["app", str(model_folder_for_app), "--port", str(free_port()), "--picture", "nowhere.png"]) == 2
    assert "nowhere.png can't be used" in capsys.readouterr().err
