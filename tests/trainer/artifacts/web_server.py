"""Small HTTP servers of the tests: a web server with ranges and ETags, and a stand-in of the Hugging Face Hub's API.

The stand-in answers only what huggingface_hub asks for: repository info, tree, paths-info and resolve.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Request(NamedTuple):
    """What a client asked; `range` is its Range header."""

    method: str
    path: str
    range: str | None


class WebServer:
    """Serves `files` (path to content). `cuts` breaks a path's next whole answers after so many bytes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}
        self.refused: dict[str, int] = {}  # path to status
        self.redirects: dict[str, str] = {}
        self.ignores_ranges = False
        self.requests: list[Request] = []
        self.queries: list[str] = []
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        """Any request."""
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(Request(handler.command, path, handler.headers.get("Range")))
        self.queries.append(urlsplit(handler.path).query)
        if status := self.refused.get(path):
            self.send(handler, status)
        elif target := self.redirects.get(path):
            self.send(handler, 302, headers={"Location": target})
        elif path in self.files:
            self.send_file(handler, path, self.files[path])
        else:
            self.send(handler, 404)

    def send_file(
        self, handler: BaseHTTPRequestHandler, path: str, content: bytes, etag: str = "", **headers: str
    ) -> None:
        """With Range, If-Range and If-Match, as servers do."""
        etag = etag or f'"{hashlib.md5(content).hexdigest()}"'
        first, last, status = 0, len(content) - 1, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if handler.headers.get("If-Match", etag) != etag:
            self.send(handler, 412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        if wanted and handler.headers.get("If-Range", etag) == etag and content and not self.ignores_ranges:
            first, last, status = int(wanted[1]), min(last, int(wanted[2] or last)), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        cut = None
        if handler.command == "GET" and last - first > 0 and self.cuts.get(path):
            cut = self.cuts[path].pop(0)
        self.send(handler, status, content[first : last + 1], {"ETag": etag, **headers}, cut)

    def send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        """One answer; `cut` closes the connection after so many bytes of it."""
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            handler.close_connection = True

    def downloads(self) -> list[Request]:
        """Requests for content; a look at the first byte is none."""
        return [request for request in self.requests if request.method == "GET" and request.range != "bytes=0-0"]


class S3StandIn(WebServer):
    """NOT an S3 server: it lists and gives the objects of a bucket, whose paths are `/bucket/key`."""

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        """Any request."""
        parts = urlsplit(handler.path)
        asked = parse_qs(parts.query)
        if "list-type" not in asked:
            return super().answer(handler, body)
        prefix = asked.get("prefix", [""])[0]
        bucket = f"/{parts.path.strip('/')}/"
        items = [
            f"<Contents><Key>{path.removeprefix(bucket)}</Key><Size>{len(content)}</Size>"
            f'<ETag>"{hashlib.md5(content).hexdigest()}"</ETag></Contents>'
            for path, content in sorted(self.files.items())
            if path.startswith(bucket + prefix)
        ]
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>"
        return self.send(handler, 200, text.encode(), {"Content-Type": "application/xml"})

    def environment(self) -> dict[str, str]:
        """What leads a client here."""
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.url, **keys}


class HubStandIn(WebServer):
    """NOT the Hub: its API for one repository (team/tiny), one branch (main) and one commit."""

    repository = "team/tiny"

    def __init__(self) -> None:
        super().__init__()
        self.token: str | None = None  # required when set
        self.corrupt: set[str] = set()  # files that are served with other bytes than their digests say

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        """Routes of huggingface_hub; everything else is 404."""
        path = unquote(urlsplit(handler.path).path)
        if self.repository not in path:  # the client asks after more than repositories
            return self.send(handler, 404, headers={"X-Error-Code": "RepoNotFound"})
        self.requests.append(Request(handler.command, path, handler.headers.get("Range")))
        if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            return self.send(handler, 401, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        api, repo = "/api/(?:models|datasets)/", re.escape(self.repository)
        if re.fullmatch(f"{api}{repo}(/revision/(main|{COMMIT}))?", path):
            return self.json(handler, {"id": self.repository, "sha": COMMIT, "siblings": []})
        if re.fullmatch(f"{api}{repo}/revision/.*", path):
            return self.send(handler, 404, headers={"X-Error-Code": "RevisionNotFound"})
        if re.fullmatch(f"{api}{repo}/tree/{COMMIT}", path):
            return self.json(handler, [self.describe(name) for name in self.files])
        if re.fullmatch(f"{api}{repo}/paths-info/{COMMIT}", path):
            text = body.decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            return self.json(handler, [self.describe(name) for name in asked if name in self.files])
        found = re.fullmatch(f"/(?:datasets/)?{repo}/resolve/{COMMIT}/(.+)", path)
        if found and found[1] in self.files:
            content = self.files[found[1]]
            entry = self.describe(found[1])
            etag = f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"'
            served = content[::-1] if found[1] in self.corrupt else content
            return self.send_file(handler, found[1], served, etag, **{"X-Repo-Commit": COMMIT})
        return self.send(handler, 404, headers={"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"})

    def describe(self, name: str) -> dict[str, Any]:
        """As the tree lists a file; weights are in LFS."""
        content = self.files[name]
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
        if name.endswith((".safetensors", ".zip")):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        return entry

    def json(self, handler: BaseHTTPRequestHandler, value: object) -> None:
        """An answer of the API."""
        self.send(handler, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


@contextmanager
def serving(server: WebServer, certificate: Path | None = None) -> Iterator[None]:
    """Answer on a free port of 127.0.0.1, over TLS with `certificate` (.crt, its .key beside it)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            """The tests read `requests`."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    server.url = f"{'https' if certificate else 'http'}://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
