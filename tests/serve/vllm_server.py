"""`visionzip serve` as a process, asked over HTTP: good and bad requests, budgets. Run by `make test-serve`."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.families.case import cases
from tests.tiny import make_image
from visionzip import attach, save

TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}"
    "{{ part.text }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)
IMAGES = 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: Any) -> Any:
    from tests.serve.sizes import tiny_model

    case = next(case for case in cases() if case.name == "LLaVA-1.5")
    model, processor = tiny_model(case), case.processor()
    model.generation_config.suppress_tokens = None
    processor.chat_template = TEMPLATE
    attach(model, processor, case.budget)
    return save(model, tmp_path_factory.mktemp("server") / "tiny", "merged", processor=processor)


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def server(request: Any, directory: Any) -> Any:
    """``(client, engine)`` of a server that runs while the tests of this file do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--max-model-len", "256", "--enforce-eager", "--request-budgets"] if request.param == "vllm" else []
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "visionzip", "serve", str(directory), "--engine", request.param),
            *("--port", str(port), "--images", str(IMAGES), "--dtype", "float32", *options),
        ],
        env={
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    line = ""
    for line in process.stdout:  # type: ignore[union-attr]
        if line.startswith("curl "):
            break
    assert line.startswith("curl "), f"the server ended with {process.wait()}"
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        for _ in range(100):  # transformers' server is announced just before it listens
            try:
                client.get("/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        client.curl = line  # type: ignore[attr-defined]
        yield client, request.param
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def url(image: Any = None, content: bytes | None = None) -> str:
    if content is None:
        file = io.BytesIO()
        image.save(file, "PNG")
        content = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode()


def body(*urls: str, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in urls]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": "what is this"}]}
    return {"model": "tiny", "messages": [message], "max_tokens": 8, "temperature": 0, **more}


def ask(client: Any, *urls: str, **more: Any) -> Any:
    return client.post("/v1/chat/completions", json=body(*urls, **more))


def text(reply: Any) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


GOOD = url(make_image(1, (640, 480)))
TWENTY_THOUSAND = url(Image.new("1", (20_000, 20_000)))
BAD = {
    "broken base64": lambda client: ask(client, "data:image/png;base64,%%%%"),
    "a text file": lambda client: ask(client, url(content=b"just text")),
    "half an image": lambda client: ask(client, url(content=base64.b64decode(GOOD.partition(",")[2])[:2000])),
    "20,000 pixels": lambda client: ask(client, TWENTY_THOUSAND),
    "an image too many": lambda client: ask(client, *[GOOD] * (IMAGES + 1)),
    "no such model": lambda client: ask(client, GOOD, model="other"),
    "a file": lambda client: ask(client, "file:///etc/hostname"),
    "an address": lambda client: ask(client, "http://127.0.0.1:1/a.png"),
    "another address": lambda client: ask(client, "https://example.org/a.png"),
    "no JSON": lambda client: client.post("/v1/chat/completions", content=b"{"),
    "no messages": lambda client: client.post("/v1/chat/completions", json={"model": "tiny"}),
}


def test_the_printed_request_is_answered(server):
    client, _ = server
    words = shlex.split(client.curl)
    reply = client.post(words[1].partition(str(client.base_url).rstrip("/"))[2], json=json.loads(words[-1]))
    assert reply.status_code == 200, reply.text


def test_bad_requests_are_refused_and_the_server_goes_on(server):
    client, _ = server
    before = text(ask(client, GOOD))
    codes: dict[str, set[int]] = {}
    for number in range(200):
        name = (
            [*BAD][number % len(BAD)]
            if number < 2 * len(BAD)
            else ("broken base64", "a text file", "a file")[number % 3]
        )
        codes.setdefault(name, set()).add(BAD[name](client).status_code)
    assert {name: code for name, code in codes.items() if not all(400 <= each < 500 for each in code)} == {}
    assert text(ask(client, GOOD)) == before


def test_an_image_of_one_pixel_is_answered(server):
    client, _ = server
    assert ask(client, url(make_image(3, (1, 1)))).status_code == 200


def test_a_client_that_hangs_up_is_forgotten(server):
    client, _ = server
    with client.stream("POST", "/v1/chat/completions", json=body(GOOD, stream=True, max_tokens=150)) as reply:
        assert reply.status_code == 200
        next(reply.iter_bytes())
    assert text(ask(client, GOOD)) == text(ask(client, GOOD))


def test_a_request_names_a_smaller_budget(server):
    client, engine = server
    if engine != "vllm":
        assert ask(client, GOOD, mm_processor_kwargs={"budget": 8}).status_code == 400
        return
    counts = [
        ask(client, GOOD, **more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"mm_processor_kwargs": {"budget": 8}}, {}, {"mm_processor_kwargs": {"budget": 8}})
    ]
    assert counts == [counts[0], counts[0] - 24] * 2
    for wrong in ({"budget": 400}, {"budget": "x"}, {"size": {"height": 20_000}}):
        assert ask(client, GOOD, mm_processor_kwargs=wrong).status_code == 400
    assert text(ask(client, GOOD))


def test_the_openai_package_is_answered(server):
    from openai import OpenAI

    client, _ = server
    openai = OpenAI(base_url=f"{client.base_url}/v1", api_key="none")
    assert [model.id for model in openai.models.list().data] == ["tiny"]
    reply = openai.chat.completions.create(**body(GOOD))
    assert reply.choices[0].message.content == text(ask(client, GOOD))
