"""A stand-in for the Hugging Face Hub: the few answers that listing and downloading one repository need."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class Hub:
    """One repository `owner/model` at revision `main`; `token` None lets everybody in."""

    def __init__(self, files: dict[str, bytes], token: str | None = None) -> None:
        self.files, self.token = files, token
        self.downloaded: list[str] = []

    @contextmanager
    def serve(self) -> Iterator[str]:
        """The endpoint, while the block runs."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                status, headers, body = hub.answer(self.path, self.headers.get("Authorization"), count=with_body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, path: str, authorization: str | None, *, count: bool) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}"
        if not path.startswith(("/api/models/owner/model", "/owner/model/")):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if path.startswith("/api/"):
            return self._describe(path)
        name = path.partition("/resolve/")[2].partition("/")[2]
        body = self.files[name]
        if count:
            self.downloaded.append(name)
        etag = hashlib.sha256(body).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Type": "application/octet-stream"}, body

    def _describe(self, path: str) -> tuple[int, dict[str, str], bytes]:
        what, _, revision = path.removeprefix("/api/models/owner/model").strip("/").partition("/")
        if revision not in ("", "main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if what == "tree":
            answer: object = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in self.files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in self.files]
            answer = {"id": "owner/model", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
