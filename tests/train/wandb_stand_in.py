"""The few answers of W&B's HTTP interface that `wandb sync` and an online run need, on a local port."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbStandIn:
    """Collects what clients upload. `history`: run id → the logged rows, in the order they came."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.upserted: list[str] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = json.dumps(stand_in.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            run = path.split("/")[-2]
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history.setdefault(run, []).extend(json.loads(line) for line in lines)
            return {}
        if path != "/graphql":
            return {}
        request = json.loads(body)
        given = request.get("variables") or {}
        if "upsertBucket" in request["query"]:
            self.upserted.append(given["name"])
            entity = {"id": "e", "name": "me"}
            project = {"id": "p", "name": given.get("project") or "p", "entity": entity}
            bucket = {"id": "b", "name": given["name"], "displayName": "run", "description": "", "config": "{}",
                      "sweepName": None, "historyLineCount": 0, "project": project}  # fmt: skip
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": len(self.upserted) == 1}}}
        if "createRunFiles" in request["query"]:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
