"""A hub on 127.0.0.1: as much of the HTTP interface as huggingface_hub needs to push and pull a model repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_stand_in"


class Hub:
    """What is stored. `repos`: id → revision → {path: bytes}."""

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.url = ""

    def sha(self, repo, revision):
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.repos[repo][revision].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def files(self, repo, revision):
        """By branch or by the id of what is on it; None where there is none."""
        known = self.repos.get(repo, {})
        found = [branch for branch in known if revision in (branch, self.sha(repo, branch))]
        return (self.sha(repo, found[0]), known[found[0]]) if found else None


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def missing(self):
        self.answer(404, {"error": "Repository not found"}, [("X-Error-Code", "RepoNotFound")])

    def dispatch(self):
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        content = self.body()
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command in ("POST", "PUT") and not path.startswith("/lfs/") and not signed_in:
            return self.answer(401, {"error": "Invalid username or password."})
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return function(self, content, *found.groups())
        return self.answer(404, {"error": f"no such route: {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def create(self, content):
        wanted = json.loads(content)
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repos[name] = {"main": {}}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        return self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def branch(self, content, repo, revision):
        self.hub.repos[repo].setdefault(revision, dict(self.hub.repos[repo]["main"]))
        self.answer(200, {})

    def card(self, content):
        text = json.loads(content)["content"]
        good = text.startswith("---\n") and "\n---\n" in text[4:]
        self.answer(200 if good else 400, {"errors": [] if good else [{"message": "no front matter"}], "warnings": []})

    def preupload(self, content, repo, revision):
        if repo not in self.hub.repos:
            return self.missing()
        mode = {True: "lfs", False: "regular"}
        files = [
            {"path": f["path"], "uploadMode": mode[f["path"].endswith((".safetensors", ".bin"))], "shouldIgnore": False}
            for f in json.loads(content)["files"]
        ]
        return self.answer(200, {"files": files, "commitOid": None})

    def batch(self, content, repo):
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}}
            for item in json.loads(content)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects}, [("Content-Type", "application/vnd.git-lfs+json")])

    def upload(self, content, oid):
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.lfs[oid] = content
        self.answer(200)

    def commit(self, content, repo, revision):
        files = self.hub.repos[repo][revision]
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        sha = self.hub.sha(repo, revision)
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def info(self, content, repo, revision="main"):
        found = self.hub.files(repo, revision)
        if found is None:
            return self.missing()
        siblings = [{"rfilename": path} for path in found[1]]
        return self.answer(200, {"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "tags": []})

    def tree(self, content, repo, revision):
        found = self.hub.files(repo, revision)
        if found is None:
            return self.missing()
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in found[1].items()
        ]
        return self.answer(200, entries)

    def resolve(self, content, repo, revision, path):
        found = self.hub.files(repo, revision)
        if found is None:
            return self.missing()
        if path not in found[1]:
            return self.answer(404, {"error": "Entry not found"}, [("X-Error-Code", "EntryNotFound")])
        etag = hashlib.sha256(found[1][path]).hexdigest()
        return self.answer(200, found[1][path], [("ETag", f'"{etag}"'), ("X-Repo-Commit", found[0])])


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), rf"/api/models/{ID}/branch/([^/]+)", Handler.branch),
    (("POST",), r"/api/validate-yaml", Handler.card),
    (("POST",), rf"/api/models/{ID}/preupload/([^/]+)", Handler.preupload),
    (("POST",), rf"/{ID}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/lfs/(\w+)", Handler.upload),
    (("POST",), rf"/api/models/{ID}/commit/([^/]+)", Handler.commit),
    (("GET",), rf"/api/models/{ID}", Handler.info),
    (("GET",), rf"/api/models/{ID}/revision/([^/]+)", Handler.info),
    (("GET",), rf"/api/models/{ID}/tree/([^/]+)", Handler.tree),
    (("GET", "HEAD"), rf"/{ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def running():
    """A hub on a free port of 127.0.0.1."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
