"""Serves the page: which requests are accepted, and what is removed when it ends. Needs the extra ``viz``."""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

UPLOAD = "20mb"
NAMES_OF_THIS_MACHINE = ("localhost", "127.0.0.1", "[::1]")
_CSS = """
.answer textarea { font-size: 1.1rem; }
#look img { cursor: crosshair; }
footer { display: none !important; }
"""


def gradio() -> Any:
    """Gradio, without its calls to the network and with uploads in a folder of this process.

    Raises:
        ValueError: if it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if "GRADIO_TEMP_DIR" not in os.environ:  # read when components are made; only files in it are served
        folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="visionzip-app-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the app needs Gradio: pip install 'visionzip-ft[viz]'") from error
    return gradio


def exit_on_signals() -> None:
    """End on SIGTERM and SIGHUP as on any other exit, so that the folder with the uploads is removed. Main thread only."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


class Guard:
    """ASGI middleware that refuses requests which do not come from the app's own page.

    Any web page can make its reader's browser send requests to an address of this machine, and a host name can be made to
    resolve to it (DNS rebinding). So ``Host`` must be a name the app is served under, and ``Origin``, if the browser sends one,
    must be the app itself.

    Args:
        host, port: the address the app is bound to. If that is all interfaces, any IP address and this machine's name are accepted.
        public_urls: addresses at which a reverse proxy serves it, such as ``https://look.example.org``.
    """

    def __init__(self, app: Any, host: str, port: int, public_urls: Sequence[str] = ()) -> None:
        self.app, self.port = app, port
        self.everywhere = host in ("0.0.0.0", "::", "")
        local = self.everywhere or host == "localhost" or _is_loopback(host)
        names = {f"[{host}]" if ":" in host else host.lower()}
        names |= set(NAMES_OF_THIS_MACHINE) if local else set()
        names |= {socket.gethostname().lower()} if self.everywhere else set()
        self.hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())
        self.origins = set()
        for url in public_urls:
            parts = urlsplit(url)
            self.hosts.add(parts.netloc.lower())
            self.origins.add(f"{parts.scheme}://{parts.netloc}".lower())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self.is_ours(host):
            reason = f"{host or 'no host'} is not an address of this app; see visionzip app --public-url"
        elif origin is not None and not self.is_own_origin(origin):
            reason = f"{origin} is another site; see visionzip app --public-url"
        else:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        plain = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 403, "headers": plain})
        await send({"type": "http.response.body", "body": f"{reason}\n".encode()})

    def is_ours(self, host: str) -> bool:
        """Whether `host`, the value of a ``Host`` header, is a name that the app is served under."""
        if host in self.hosts:
            return True
        name, _, port = host.rpartition(":")
        return self.everywhere and port == str(self.port) and _is_address(name.strip("[]"))

    def is_own_origin(self, origin: str) -> bool:
        scheme, _, host = origin.partition("://")
        return origin in self.origins or (scheme == "http" and self.is_ours(host))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


class Server:
    """A page that is being served from a separate thread. `address`: its URL."""

    def __init__(self, page: Any, host: str, port: int, public_urls: Sequence[str] = ()) -> None:
        import uvicorn
        from fastapi import FastAPI

        gr = gradio()
        page.queue(default_concurrency_limit=1, max_size=32)
        app = gr.mount_gradio_app(
            FastAPI(), page, "/", server_name=host, server_port=port, max_file_size=UPLOAD, allowed_paths=[], css=_CSS,
            show_error=True, footer_links=[], run_history=False, ssr_mode=False, root_path=public_urls[0] if public_urls else None,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )  # fmt: skip
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                Guard(app, host, port, public_urls), host, port, log_level="warning", timeout_graceful_shutdown=1
            )
        )
        self._thread = threading.Thread(target=self._server.run, name="visionzip-app", daemon=True)

    def start(self) -> Server:
        """Start listening.

        Raises:
            ValueError: if that fails.
        """
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise ValueError(f"the app could not listen at {self.address}")
            time.sleep(0.02)
        return self

    def wait(self) -> None:
        """Block until the server ends or a signal arrives."""
        while self._thread.is_alive():
            self._thread.join(1.0)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10.0)


def serve(page: Any, host: str = "127.0.0.1", port: int = 7860, public_urls: Sequence[str] = ()) -> Server:
    """Serve the page. Uploads are limited in size and stored in a folder of this process; no other file is served.

    Raises:
        ValueError: if the port is in use or can't be bound.
    """
    check_port(host, port)
    return Server(page, host, port, public_urls).start()


def check_port(host: str, port: int) -> None:
    """Raise ``ValueError`` if it is not possible to listen at `host` and `port`."""
    if not 0 < port < 65536:
        raise ValueError(f"port {port} is not valid; choose one from 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} on {host} can't be used ({error.strerror}); choose another with --port"
            ) from error
