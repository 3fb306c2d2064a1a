"""Files over https://: streamed, resumed after a broken connection, and identified by their ETag."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import urllib3
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from internvl_trainer.artifacts.storage import StoredFile, inside
from internvl_trainer.errors import AccessDenied, Unavailable, UserError

_CHUNK = 1 << 16  # the most that is read again after a broken connection
_ATTEMPTS = 6
# Plain HTTP cannot list a folder: these are the files a checkpoint may have, beside the shards its index names.
_INDEX = "model.safetensors.index.json"
_CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "model.safetensors", _INDEX,
)  # fmt: skip


class HttpsSource:
    """Read-only files under a URL; the key "" is the file of the URL itself. Messages leave a signature out."""

    def __init__(self, uri: str, *, field: str) -> None:
        self._parts, self._field = urlsplit(uri), field
        self.uri = urlunsplit((self._parts.scheme, self._parts.netloc, self._parts.path, "", "")).rstrip("/")

    def list(self) -> Iterator[StoredFile]:
        """The files of a checkpoint that the server has; each possible one costs a request."""
        found = [file for name in _CHECKPOINT_FILES if (file := self.stat(name))]
        yield from found
        if any(file.key == _INDEX for file in found):
            shards = set(json.loads(self.read(_INDEX)).get("weight_map", {}).values())
            yield from (file for name in sorted(shards) if (file := self.stat(inside(name, field=self._field))))

    def stat(self, key: str = "") -> StoredFile | None:
        """The file of that key, or None. Reads its first byte, because a signed URL often permits only GET."""
        response = self._get(key, {"Range": "bytes=0-0"})
        try:
            if response.status in (404, 410):
                return None
            if response.status not in (200, 206, 416):
                raise self._failure(key, response.status)
            return StoredFile(key, self._size(key, response), _version(response))
        finally:
            response.close()

    def read(self, key: str) -> bytes:
        """The whole of a small file."""

        def get() -> bytes:
            response = self._get(key, {})
            if response.status != 200:
                response.close()
                raise self._failure(key, response.status)
            return response.read()

        try:
            return _retrying()(get)
        except HTTPError as error:
            raise self._lost(key, error) from error

    def download(self, key: str, path: Path) -> None:
        """Stream to `path`, continuing a partial download of the same version."""
        file = self.stat(key)
        if file is None:
            raise self._failure(key, 404)
        try:
            _retrying()(self._append, file, path)
        except HTTPError as error:
            raise self._lost(key, error) from error

    def _append(self, file: StoredFile, path: Path) -> None:
        have = path.stat().st_size if path.exists() else 0
        strong = file.etag.startswith('"')  # a weak ETag does not promise equal bytes, so such a download starts over
        if have and have == file.size and strong:
            return
        go_on = 0 < have < file.size and strong
        response = self._get(file.key, {"Range": f"bytes={have}-", "If-Range": file.etag} if go_on else {})
        try:
            if response.status not in (200, 206):
                raise self._failure(file.key, response.status)
            if _version(response) != file.etag:
                raise Unavailable("DownloadIncomplete", f"{self._place(file.key)} changed while it was read; try again")
            with path.open("ab" if response.status == 206 else "wb") as target:
                for chunk in response.stream(_CHUNK):
                    target.write(chunk)
        finally:
            response.close()
        if path.stat().st_size != file.size:
            raise urllib3.exceptions.ProtocolError("cut short")

    def _get(self, key: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            response = _pool(os.getpid()).request("GET", self._url(key), headers=headers, preload_content=False)
        except HTTPError as error:
            raise self._lost(key, error) from error
        history = response.retries.history if response.retries else ()
        if any((step.redirect_location or "").startswith("http://") for step in history):
            response.close()
            raise UserError("UnsupportedSource", f"{self._place(key)} redirects away from https://", self._field)
        return response

    def _size(self, key: str, response: urllib3.BaseHTTPResponse) -> int:
        told = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length")
        if told is None or not told.isdigit():
            raise UserError(
                "UnsupportedSource",
                f"{self._place(key)}: the server tells no size, so a cut file could not be told from a whole one; "
                "put it on s3:// or a PVC",
                self._field,
            )
        return int(told)

    def _url(self, key: str) -> str:
        path = self._parts.path
        if key:
            path = f"{path.rstrip('/')}/{quote(inside(key, field=self._field))}"
        return urlunsplit((self._parts.scheme, self._parts.netloc, path, self._parts.query, ""))

    def _place(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    def _failure(self, key: str, status: int) -> UserError:
        place = self._place(key)
        if status in (404, 410):
            return UserError("NotFound", f"found no file {place}; check the URL", self._field)
        if status in (401, 403):
            return AccessDenied(
                "AccessDenied", f"{place} was refused ({status}); use a public or a signed URL, or s3://", self._field
            )
        return Unavailable("ServerUnavailable", f"{place}: the server answered {status}", self._field)

    def _lost(self, key: str, error: HTTPError) -> UserError:
        """Names only the kind of error: its text may hold the URL's query, and with it a signature."""
        cause = error.reason if isinstance(error, MaxRetryError) else error
        advice = "; a private authority's certificate goes into SSL_CERT_FILE" if isinstance(cause, SSLError) else ""
        message = f"{self._place(key)}: {type(cause).__name__}: the server did not answer{advice}"
        return Unavailable("ServerUnavailable", message, self._field)


def _version(response: urllib3.BaseHTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _retrying() -> Retrying:
    return Retrying(
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_exponential(0.1, max=10),
        retry=retry_if_exception_type(HTTPError),
        reraise=True,
    )


@lru_cache(maxsize=1)
def _pool(_process: int) -> urllib3.PoolManager:
    """A connection pool for each process: connections do not survive a fork."""
    retries = urllib3.Retry(
        total=5, redirect=5, backoff_factor=0.2, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
    )
    return urllib3.PoolManager(maxsize=32, retries=retries, timeout=urllib3.Timeout(connect=10, read=60))
