"""The app without a browser: what it can do, and what its server lets through. `make test-browser` looks at the page itself."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, detach
from visionzip.analysis.ask import ask
from visionzip.app.looker import Looker, patch_at
from visionzip.app.server import Guard, check_port, gradio, serve
from visionzip.app.ui import Handlers, build
from visionzip.cli import main

BUDGET = ZipConfig(dominant=5, contextual=3)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def looker(model, processor):
    return Looker(attach(model, processor, BUDGET), processor)


@pytest.fixture
def look(looker, tmp_path):
    make_image(0).save(tmp_path / "a.png")
    return looker.look(tmp_path / "a.png")


def answer(config, question="what is this", image_=None):
    model, processor = tiny_llava(), tiny_processor()
    if config is not None:
        attach(model, processor, config)
    return ask(model, processor, image_ or make_image(0), question, max_new_tokens=6)


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


def test_a_projector_for_several_budgets(model, processor, tmp_path):
    """The trained ones are offered; the line below the drawings says when another one is shown."""
    config = ZipConfig.model_validate({"dominant": 5, "contextual": 1, "budgets": ["3+1", "5+1", "9+3"]})
    looker = Looker(attach(model, processor, config), processor)
    assert looker.trained_budgets() == [(3, 1), (5, 1), (9, 3)]
    page = build(looker, "test")
    shown = next(each for each in page.blocks.values() if getattr(each, "elem_id", None) == "trained")
    assert [label for label, _ in shown.choices] == ["4", "6", "12"]
    assert shown.visible
    assert shown.value == "6"
    make_image(0).save(tmp_path / "a.png")
    handlers = Handlers(gradio(), looker)
    look = looker.look(tmp_path / "a.png")
    kept, merged, *_, words = handlers.choose_trained("12", look, 0, 5, 1, "visionzip", "add")
    assert (kept, merged) == (9, 3)
    assert "12 of 16 visual tokens" in words
    assert "not trained" not in words
    *_, words = handlers.show_budget(look, 0, 2, 0, "visionzip", "add")
    assert "The projector was not trained for this budget." in words


def test_an_empty_question(looker, look):
    with pytest.raises(ValueError, match="the question is empty"):
        looker.answers(look, "  ", BUDGET)


def test_the_model_is_as_it_was_after_a_failure(looker, look, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(looker.model, "generate", fail)
    looker.warm = True
    with pytest.raises(RuntimeError, match="out of memory"):
        looker.answers(look, "what is this", ZipConfig(dominant=9, contextual=1))
    assert attached(looker.model).config == BUDGET


def test_an_image_that_is_none(looker, tmp_path):
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(ValueError, match="unreadable image"):
        looker.look(tmp_path / "a.png")


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
    make_image(0).save(folder / "a.png")
    model, processor = tiny_llava(), tiny_processor()
    looker = Looker(attach(model, processor, BUDGET), processor)
    server = serve(build(looker, "tiny", str(folder / "a.png")), port=free_port())
    yield server.address
    server.close()


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
    make_image(seed).save(buffer, "PNG")
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
    asked = call(client, address, "ask", [None, 0, "what is this", 6, 5, 3, "visionzip", "add"])
    full, few, times = asked["output"]["data"]
    assert (full, few) == (answer(None).text, answer(BUDGET).text)
    assert [row[1] for row in times["data"]] == [16, 8]


def test_a_bad_image_gets_one_clear_message(client, address):
    (path,) = upload(client, address, b"no image").json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answered = call(client, address, "open", [file, "visionzip", "add"], session="bad")
    assert not answered["success"]
    assert "unreadable image" in answered["output"]["error"]


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
    with pytest.raises(ValueError, match="is not valid"):
        check_port("127.0.0.1", 99999)


@pytest.fixture(scope="module")
def model_folder_for_app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llava().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def test_an_image_that_does_not_exist(model_folder_for_app, capsys):
    assert main(["app", str(model_folder_for_app), "--port", str(free_port()), "--image", "nowhere.png"]) == 2
    assert "nowhere.png: file missing" in capsys.readouterr().err


# ---------------------------------------------------------------- whom it answers


FOREIGN = [
    "http://evil.example",
    "https://127.0.0.1:7860.evil.example",
    "http://127.0.0.1:1",
    "null",
    "https://localhost",
]


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/data?session_hash=s"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", ""]
)
def test_other_host_names_are_refused(client, address, host, path):
    """A name that was made to resolve to this machine makes a foreign page the app's own (DNS rebinding)."""
    port = address.rsplit(":", 1)[1]
    refused = client.get(address + path, headers={"Host": host.format(port=port)})
    assert refused.status_code == 403
    assert "--public-url" in refused.text


@pytest.mark.parametrize("origin", FOREIGN)
def test_other_sites_are_refused(client, address, origin):
    headers = {"Origin": origin}
    upload = client.post(f"{address}/gradio_api/upload", files={"files": ("a.png", png())}, headers=headers)
    preflight = client.options(
        f"{address}/gradio_api/upload", headers={**headers, "Access-Control-Request-Method": "POST"}
    )
    for answered in (upload, preflight, client.get(f"{address}/config", headers=headers)):
        assert answered.status_code == 403
        assert not [name for name in answered.headers if name.startswith("access-control")]


def test_its_own_names_are_answered(client, address):
    port = address.rsplit(":", 1)[1]
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        headers = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        assert client.get(f"{address}/config", headers=headers).status_code == 200


def guard(host, urls=(), port=7860):
    return Guard(None, host, port, urls)


def test_all_addresses_of_a_machine_but_no_name_of_another():
    every = guard("0.0.0.0")
    for host in ("10.0.0.7:7860", "[fe80::1]:7860", "localhost:7860", f"{socket.gethostname().lower()}:7860"):
        assert every.is_ours(host)
    for host in ("evil.example:7860", "10.0.0.7:80", "10.0.0.7", ""):
        assert not every.is_ours(host)
    one = guard("10.0.0.7")
    assert one.is_ours("10.0.0.7:7860")
    assert not one.is_ours("localhost:7860")
    assert not one.is_ours("10.0.0.8:7860")


def test_a_reverse_proxy():
    """With its host handed on or not; its own origin alone is added."""
    behind = guard("127.0.0.1", ["https://look.example.org"])
    assert behind.is_ours("look.example.org")
    assert behind.is_ours("127.0.0.1:7860")
    assert behind.is_own_origin("https://look.example.org")
    for origin in ("http://evil.example", "https://look.example.org.evil.example", "https://127.0.0.1:7860"):
        assert not behind.is_own_origin(origin)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_uploads_are_gone_when_it_ends(name, model_folder_for_app, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "visionzip", "app", str(model_folder_for_app), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    environment.pop("GRADIO_TEMP_DIR", None)
    app = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that; the test is of one that is not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert "Ctrl+C" in app.stdout.readline(), app.stderr.read()
        with httpx.Client(timeout=60, trust_env=False) as client:
            (path,) = upload(client, f"http://127.0.0.1:{port}", png()).json()
        assert tmp_path in Path(path).parents
        app.send_signal(getattr(signal, name))
        assert app.wait(60) == {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130}[name]
    finally:
        app.kill()
    assert not [left for left in tmp_path.iterdir() if left.name.startswith("visionzip-app-")]
