"""A server on this machine that speaks the protocol of the Hugging Face hub, as far as models are fetched and pushed."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REGULAR_BYTES = 1000
"""A larger file is sent apart from the commit (Git LFS)."""


class Hub(ThreadingHTTPServer):
    """Serves `models` (name -> path in the repository -> bytes); the first sending of `cut` ends early."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.models: dict[str, dict[str, bytes]] = {}
        self.sent: list[tuple[str, str, str | None]] = []
        self.cut: str | None = None
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        model, _, path = self.path.removeprefix("/api/models").strip("/").partition(f"/resolve/{COMMIT}/")
        model, _, path = (model, "", path) if path else model.partition("/resolve/main/")
        model, tree, _ = model.partition("/tree/main")
        files = self.server.models.get(model.partition("/revision/")[0])
        if files is None or (path and path not in files):
            self._send(404, b"", {"X-Error-Code": "RepoNotFound" if files is None else "EntryNotFound"})
        elif path and "org/gated" in model:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif tree:
            self._tell([{"type": "file", "path": name, "oid": "", "size": len(files[name])} for name in files])
        elif not path:
            self._tell({"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        else:
            etag = {"ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            wanted = self.headers.get("Range")
            begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if self.command == "GET":
                self.server.sent.append((model, path, wanted))
            self._send(206 if wanted else 200, files[path][begin:], etag, path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        model, _, action = self.path.removeprefix("/api/models").strip("/").rpartition("/")
        body = self._read()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.models.setdefault(name, {})
            self._tell({"url": f"{self.server.url}/{name}"})
        elif "/preupload/" in self.path:
            modes = [
                (one["path"], "lfs" if one["size"] > REGULAR_BYTES else "regular") for one in json.loads(body)["files"]
            ]
            self._tell({"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]})
        elif action == "batch":
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.url}/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._tell({"transfer": "basic", "objects": objects})
        else:
            model = model.removesuffix("/commit")
            for line in body.splitlines():
                self._commit(self.server.models[model], **json.loads(line))
            self._tell(
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/{model}/commit/{COMMIT}"}
            )

    def _commit(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.server.blobs[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]

    def do_PUT(self) -> None:
        self.server.blobs[self.path.strip("/")] = self._read()
        self._send(200, b"")

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _tell(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, path: str = "") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            cut, self.server.cut = (
                path and path == self.server.cut,
                None if path == self.server.cut else self.server.cut,
            )
            self.wfile.write(body[: len(body) * 15 // 16] if cut else body)

    def log_message(self, *_: object) -> None:
        pass
