"""NOT the Hub: a stand-in of the part of its HTTP API that huggingface_hub writes models with.

Repositories are made, large files come by Git LFS and are checked against their digest, and a commit puts files onto a
branch. Of Xet, the Hub's own way for large files, it takes the blocks and looks into none: a file that came so is only
known by the digest that its commit names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from trainer.artifacts.web_server import Request, WebServer

Files = dict[str, bytes]


@dataclass
class Repository:
    """Branch to the files of its newest commit."""

    private: bool
    branches: dict[str, Files] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"initial commit").hexdigest()])


class HubWriteStandIn(WebServer):
    """Answers to `token` alone. `refused_when` gives the status of a request that is to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.token = "hf_writer"
        self.repositories: dict[str, Repository] = {}
        self.large: Files = {}  # by sha256
        self.blocks: Files = {}  # of Xet, by Xet's own digest
        self.refused_when: Callable[[Request], int | None] = lambda _: None
        self.held_when: Callable[[Request], bool] = lambda _: False
        self.reached = threading.Event()  # a request is held, and never answered

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        """Routes that huggingface_hub 2.4 uses to publish; everything else is 404."""
        path = handler.path.partition("?")[0]
        request = Request(handler.command, path, None)
        self.requests.append(request)
        if self.held_when(request):
            self.reached.set()
            threading.Event().wait()
        if status := self.refused_when(request):
            return self.send(handler, status)
        if path.startswith("/lfs/"):  # a signed address: the Hub's token is not sent there
            return self.receive(handler, path.removeprefix("/lfs/"), body)
        if path.startswith("/xet/"):  # with a token of its own
            return self.receive_block(handler, path, body)
        if handler.headers.get("Authorization") != f"Bearer {self.token}":
            return self.send(handler, 401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        routes: list[tuple[str, Callable[..., Any]]] = [
            (r"POST /api/repos/create", self.create),
            (r"POST /api/validate-yaml", lambda _: {"errors": [], "warnings": []}),
            (r"GET /api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.info),
            (r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)", self.branch),
            (r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)", self.modes),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/verify", lambda *_: {}),
            (r"GET /api/models/([^/]+/[^/]+)/xet-write-token/([^/]+)", self.open_xet),
            (r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)", self.commit),
        ]
        for pattern, route in routes:
            if match := re.fullmatch(pattern, f"{handler.command} {path}"):
                lines = [json.loads(line) for line in body.splitlines()] if body else [None]
                found = route(*match.groups(), lines if "/commit/" in path else lines[0])
                status, value = found if isinstance(found, tuple) else (200, found)
                return self.send(handler, status, json.dumps(value).encode(), {"Content-Type": "application/json"})
        self.send(handler, 404, headers={"X-Error-Code": "RepoNotFound"})

    def create(self, asked: dict[str, Any]) -> Any:
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return 409, answer
        self.repositories[name] = Repository(asked["visibility"] == "private")
        return answer

    def info(self, name: str, _body: object) -> Any:
        return {"id": name, "sha": self.repositories[name].commits[-1], "siblings": []}

    def branch(self, name: str, branch: str, _body: object) -> Any:
        branches = self.repositories[name].branches
        if branch in branches:
            return 409, {}
        branches[branch] = dict(branches["main"])
        return {}

    def modes(self, name: str, branch: str, asked: dict[str, Any]) -> Any:
        """Weights and pictures are large files; `oid` is of what the branch has."""
        files = self.repositories[name].branches[branch]
        return {"files": [self._mode(each["path"], files) for each in asked["files"]]}

    def batch(self, _name: str, asked: dict[str, Any]) -> Any:
        """No actions for what is there already."""
        objects = [{"oid": each["oid"], "size": each["size"]} for each in asked["objects"]]
        for each in objects:
            if each["oid"] not in self.large:
                each["actions"] = {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def receive(self, handler: BaseHTTPRequestHandler, oid: str, body: bytes) -> None:
        """A large file; other bytes than its digest says are refused."""
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send(handler, 400)
        self.large[oid] = body
        return self.send(handler, 200)

    def open_xet(self, *_: object) -> Any:
        """Where blocks go, and until when (seconds since 1970)."""
        return {"accessToken": "xet-token", "casUrl": f"{self.url}/xet", "exp": 4_000_000_000}

    def receive_block(self, handler: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        """A block, or which blocks are a file; questions after blocks that may be there are answered with no."""
        match path.split("/")[2:4]:
            case ["v1", "xorbs"]:
                self.blocks[path] = body
                self.send(handler, 200, b'{"was_inserted": true}', {"Content-Type": "application/json"})
            case ["v1", "shards"]:
                self.send(handler, 200, b'{"result": 1}', {"Content-Type": "application/json"})
            case _:
                self.send(handler, 404)

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> Any:
        repository = self.repositories[name]
        files = dict(repository.branches[branch])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]] if not self.blocks else value["oid"].encode()
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        repository.branches[branch] = files
        repository.commits.append(hashlib.sha1(json.dumps(lines).encode()).hexdigest())
        return {"commitUrl": f"{self.url}/{name}/commit/{repository.commits[-1]}", "commitOid": repository.commits[-1]}

    def uploads(self) -> list[str]:
        """Digests of the large files that were sent, in order, each as often as it was."""
        return [request.path.removeprefix("/lfs/") for request in self.requests if request.method == "PUT"]

    @staticmethod
    def _mode(path: str, files: Files) -> dict[str, Any]:
        is_large = path.endswith((".safetensors", ".png"))
        content = files.get(path)
        digest = None
        if content is not None:
            blob = f"blob {len(content)}\0".encode() + content
            digest = hashlib.sha256(content).hexdigest() if is_large else hashlib.sha1(blob).hexdigest()
        mode = "lfs" if is_large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": digest}
