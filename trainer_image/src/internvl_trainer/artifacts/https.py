"""Files over https://: streamed, resumed after a broken connection, and identified by their ETag.

Redirects are followed one by one: each target is https:// and passes `checked_connection` before a request goes out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import urllib3
from internvl_api.address import Address, credentials_message, has_credentials
from tenacity import retry_if_exception_type
from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

from internvl_trainer.artifacts.checked_connection import CheckedPool
from internvl_trainer.artifacts.ranges import RangesUnsupported, changed, check_answer, check_length, retrying
from internvl_trainer.artifacts.storage import StoredFile, inside
from internvl_trainer.errors import AccessDenied, BadFile, Unavailable, UserError
from internvl_trainer.json_text import parse_json

_CHUNK = 1 << 16  # the most that is read again after a broken connection
_BROKEN = retry_if_exception_type(HTTPError)
_LARGEST_SMALL_FILE = 1 << 30  # of what is read at once: an index, a picture or a video
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_VARIABLE = re.compile(r"\$\((SOURCE_[A-Z0-9_]+)\)")
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
        address = Address(uri)
        if has_credentials(address.reveal()):
            raise UserError("UnsupportedSource", credentials_message(address.reveal()), field)
        self._parts, self._field = urlsplit(_filled_in(address.reveal(), field)), field
        self.uri = re.split(r"[?#;]", address, maxsplit=1)[0].rstrip("/")

    def list(self) -> Iterator[StoredFile]:
        """The files of a checkpoint that the server has; each possible one costs a request."""
        found = [file for name in _CHECKPOINT_FILES if (file := self.stat(name))]
        yield from found
        if any(file.key == _INDEX for file in found):
            shards = shard_names(self.read(_INDEX), self._place(_INDEX))
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
            data = response.read(_LARGEST_SMALL_FILE + 1)
            if len(data) > _LARGEST_SMALL_FILE:
                response.close()
                raise BadFile("FileTooLarge", f"{self._place(key)} has more than {_LARGEST_SMALL_FILE} bytes")
            if (told := response.headers.get("Content-Length")) and int(told) != len(data):
                raise urllib3.exceptions.ProtocolError("cut short")
            response.release_conn()
            return data

        try:
            return retrying(_BROKEN)(get)
        except HTTPError as error:
            raise self._lost(key, error) from error

    def read_start(self, key: str, length: int) -> bytes:
        """The first `length` bytes of a file, also from a server that knows no ranges."""

        def get() -> bytes:
            response = self._get(key, {"Range": f"bytes=0-{length - 1}"})
            try:
                if response.status not in (200, 206):
                    raise self._failure(key, response.status)
                return response.read(length)
            finally:
                response.close()

        try:
            return retrying(_BROKEN)(get)
        except HTTPError as error:
            raise self._lost(key, error) from error

    def read_range(self, file: StoredFile, start: int, end: int) -> bytes:
        """Bytes [start, end) of this version of a file; see RangeSource."""
        place = self._place(file.key)
        if not file.etag.startswith('"'):  # a weak ETag does not promise equal bytes
            raise RangesUnsupported("RangesUnsupported", f"{place}: the server gives no strong ETag")
        response = self._get(file.key, {"Range": f"bytes={start}-{end - 1}", "If-Match": file.etag})
        try:
            if response.status == 412 or (response.status in (200, 206) and _version(response) != file.etag):
                raise changed(place)
            if response.status not in (200, 206):
                raise self._failure(file.key, response.status)
            check_answer(place, response.status, response.headers.get("Content-Range"), start, end, file.size)
            data = response.read(end - start + 1)
        except HTTPError as error:
            raise self._lost(file.key, error) from error
        finally:
            response.close()
        check_length(place, data, end - start)
        return data

    def download(self, key: str, path: Path) -> None:
        """Stream to `path`, continuing a partial download of the same version."""
        file = self.stat(key)
        if file is None:
            raise self._failure(key, 404)
        try:
            retrying(_BROKEN)(self._append, file, path)
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
                raise changed(self._place(file.key))
            with path.open("ab" if response.status == 206 else "wb") as target:
                for chunk in response.stream(_CHUNK):
                    target.write(chunk)
        finally:
            response.close()
        if path.stat().st_size != file.size:
            raise urllib3.exceptions.ProtocolError("cut short")

    def _get(self, key: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        headers = {"Accept-Encoding": "identity", **headers}
        url = self._url(key)
        for _ in range(_MOST_REDIRECTS + 1):
            try:
                response = _pool(os.getpid()).request(
                    "GET", url, headers=headers, preload_content=False, redirect=False
                )
            except HTTPError as error:
                raise self._lost(key, error) from error
            except UserError as error:  # the address was refused
                raise UserError(error.reason, f"{self._place(key)}: {error.message}", self._field) from error
            target = response.headers.get("Location") if response.status in _REDIRECTS else None
            if target is None:
                return response
            response.close()
            url = urljoin(url, target)
            if urlsplit(url).scheme != "https":
                raise UserError("UnsupportedSource", f"{self._place(key)} redirects away from https://", self._field)
        raise UserError(
            "UnsupportedSource", f"{self._place(key)} redirects more than {_MOST_REDIRECTS} times", self._field
        )

    def _size(self, key: str, response: urllib3.BaseHTTPResponse) -> int:
        told = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length")
        if told is None or not told.isdigit():
            raise UserError(
                "UnsupportedSource",
                f"{self._place(key)}: the server tells no size, so a cut file could not be told from a whole one; "
                "put it in object storage or on a PVC",
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
                "AccessDenied",
                f"{place} was refused ({status}); use a public URL, a signed URL or an object store",
                self._field,
            )
        return Unavailable("ServerUnavailable", f"{place}: the server answered {status}", self._field)

    def _lost(self, key: str, error: HTTPError) -> UserError:
        """Names only the kind of error: its text may hold the URL's query, and with it a signature."""
        cause = error.reason if isinstance(error, MaxRetryError) else error
        advice = "; a private authority's certificate goes into SSL_CERT_FILE" if isinstance(cause, SSLError) else ""
        message = f"{self._place(key)}: {type(cause).__name__}: the server did not answer{advice}"
        return Unavailable("ServerUnavailable", message, self._field)


def shard_names(index: bytes, place: str) -> set[str]:
    """File names in a model.safetensors.index.json. Raises UserError for a file of another form."""
    document = parse_json(index, place)
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError("InvalidIndex", "expected an object with weight_map: {tensor: file}", place)
    return set(names.values())


def _filled_in(uri: str, field: str) -> str:
    """The address with $(SOURCE_NAME) in its query replaced by that variable of the environment."""

    def value(match: re.Match[str]) -> str:
        if (found := os.environ.get(match[1])) is None:
            message = f"{match[0]} is not set; set {match[1]} in podTemplate.env from a Secret"
            raise UserError("VariableMissing", message, field)
        return found.removeprefix("?")

    path, mark, query = uri.partition("?")
    return path + mark + _VARIABLE.sub(value, query)


def _version(response: urllib3.BaseHTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


@lru_cache(maxsize=1)
def _pool(_process: int) -> urllib3.PoolManager:
    """A connection pool for each process: connections do not survive a fork."""
    retries = urllib3.Retry(
        total=5, redirect=0, backoff_factor=0.2, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
    )
    pool = urllib3.PoolManager(maxsize=32, retries=retries, timeout=urllib3.Timeout(connect=10, read=60))
    pool.pool_classes_by_scheme = {"https": CheckedPool}
    return pool
