"""Storage over Google Cloud Storage: generations as conditions; Google's errors become UserErrors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import google.auth
import requests
from google.api_core.exceptions import (
    GoogleAPICallError,
    NotFound,
    PreconditionFailed,
    RequestRangeNotSatisfiable,
    RetryError,
)
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY
from google.oauth2 import service_account

from internvl_trainer.artifacts.object_storage import (
    PART,
    SHA256,
    CredentialsError,
    Head,
    ObjectStorage,
    Service,
    widen,
)
from internvl_trainer.artifacts.ranges import changed
from internvl_trainer.artifacts.storage import StoredFile, Tagged
from internvl_trainer.errors import UserError

ENV_KEY = "GOOGLE_APPLICATION_CREDENTIALS_JSON"
ENV_ENDPOINT = "STORAGE_EMULATOR_HOST"

_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)
_RETRY = DEFAULT_RETRY.with_timeout(30.0)
_TIMEOUT = (10, 60)  # seconds to connect, and between two bytes
_DENIED = (401, 403)


class GCSStorage(ObjectStorage):
    """Keys under gs://bucket/prefix."""

    service = Service(
        "gs://",
        "bucket",
        ENV_KEY,
        "the roles that the bucket grants",
        f"the network and {ENV_ENDPOINT} where it is set",
    )
    errors = (GoogleAPICallError, RetryError, GoogleAuthError, DataCorruption, requests.RequestException, ValueError)

    def read(self, key: str) -> bytes:
        return self._call(key, lambda client: _content(self._blob(client, key)))

    def read_start(self, key: str, length: int) -> bytes:
        def get(client: Any) -> bytes:
            try:
                return _content(self._blob(client, key), start=0, end=length - 1)
            except RequestRangeNotSatisfiable:  # an empty file
                return b""

        return self._call(key, get)

    def download(self, key: str, path: Path) -> None:
        def receive(client: Any) -> None:
            with path.open("wb") as file:
                self._blob(client, key).download_to_file(file, raw_download=True, timeout=_TIMEOUT, retry=_RETRY)

        self._call(key, receive)

    def write(self, key: str, data: bytes) -> None:
        self._call(key, lambda client: _put(self._blob(client, key), data))

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """Send with a CRC32C, which the server checks; a large file as a resumable upload."""

        def send(client: Any) -> None:
            blob = self._blob(client, key, chunk_size=PART)
            blob.metadata = {SHA256: sha256} if sha256 else None
            blob.upload_from_filename(str(path), checksum="crc32c", timeout=_TIMEOUT, retry=_RETRY)

        self._call(key, send)

    def copy(self, source: str, key: str) -> None:
        def rewrite(client: Any) -> None:
            origin, target, token = self._blob(client, source), self._blob(client, key), None
            while True:  # a large file takes several calls
                token, *_ = target.rewrite(origin, token=token, timeout=_TIMEOUT, retry=_RETRY)
                if token is None:
                    return

        self._call(source, rewrite)

    def drop_unfinished(self, prefix: str) -> None:
        """Nothing to do: unfinished uploads are never listed, and Google deletes them after a week."""

    def _client(self) -> Any:
        return _client(os.getpid())

    def _blob(self, client: storage.Client, key: str, **options: Any) -> Any:
        return client.bucket(self._bucket).blob(self._key(key), **options)

    def _list(self, client: storage.Client, prefix: str) -> Iterator[StoredFile]:
        try:
            for blob in client.list_blobs(self._bucket, prefix=prefix, timeout=_TIMEOUT, retry=_RETRY):
                yield StoredFile(blob.name, blob.size, str(blob.generation))
        except NotFound as error:  # only a bucket can be missing
            raise self._no_bucket(prefix.removeprefix(self._root)) from error

    def _head(self, client: storage.Client, key: str) -> Head:
        blob = client.bucket(self._bucket).blob(key)
        blob.reload(timeout=_TIMEOUT, retry=_RETRY)
        return Head(
            size=blob.size,
            etag=str(blob.generation),
            modified=blob.updated.timestamp(),
            recorded=(blob.metadata or {}).get(SHA256),
            checksum=f"{blob.crc32c} {blob.md5_hash}" if blob.crc32c else None,
        )

    def _get_tagged(self, client: storage.Client, key: str) -> Tagged:
        blob = client.bucket(self._bucket).blob(key)
        data = _content(blob)
        return Tagged(data, str(blob.generation))

    def _put_if(self, client: storage.Client, key: str, data: bytes, expected: str | None) -> str | None:
        generation = 0 if expected is None else int(expected) if expected.isdecimal() else -1
        blob = client.bucket(self._bucket).blob(key)
        try:
            _put(blob, data, if_generation_match=generation)
        except PreconditionFailed:
            return None
        return str(blob.generation)

    def _get_range(self, client: storage.Client, file: StoredFile, start: int, end: int) -> bytes:
        blob = client.bucket(self._bucket).blob(self._key(file.key), generation=int(file.etag))
        try:
            return _content(blob, start=start, end=end - 1)
        except (NotFound, PreconditionFailed) as error:
            raise changed(f"{self.uri}/{file.key}") from error

    def _hash(self, client: storage.Client, key: str) -> str:
        digest = hashlib.sha256()
        with client.bucket(self._bucket).blob(key, chunk_size=PART).open("rb", raw_download=True) as file:
            while chunk := file.read(PART):
                digest.update(chunk)
        return digest.hexdigest()

    def _delete(self, client: storage.Client, key: str) -> None:
        try:
            client.bucket(self._bucket).blob(key).delete(timeout=_TIMEOUT, retry=_RETRY)
        except NotFound as error:
            if _is_bucket(error):
                raise

    def _failure(self, error: Exception, key: str) -> UserError:
        if isinstance(error, RetryError) and isinstance(error.cause, Exception):
            error = error.cause
        if isinstance(error, NotFound):
            return self._no_bucket(key) if _is_bucket(error) else self._not_found(key)
        if isinstance(error, GoogleAPICallError):
            if error.code in _DENIED:
                return self._denied(key, str(error.message)[:300])
            return self._refused(key, f"{error.code} {error.message}"[:300])
        if isinstance(error, DefaultCredentialsError):
            return self._no_credentials(key, "found no credentials")
        if isinstance(error, RefreshError):
            return self._denied(key, str(error)[:300])
        return self._unreachable(key, str(error)[:300])


def _content(blob: Any, **part: int) -> bytes:
    data: bytes = blob.download_as_bytes(raw_download=True, timeout=_TIMEOUT, retry=_RETRY, **part)
    return data


def _put(blob: Any, data: bytes, **condition: int) -> None:
    blob.upload_from_string(
        data, "application/octet-stream", checksum="crc32c", timeout=_TIMEOUT, retry=_RETRY, **condition
    )


def _is_bucket(error: NotFound) -> bool:
    """Whether it is the bucket that is missing."""
    return "bucket does not exist" in str(error.message)


@lru_cache(maxsize=1)
def _client(_process: int) -> storage.Client:
    """The client of this process, for all its threads; a fork needs its own connections, hence the argument."""
    credentials = AnonymousCredentials() if os.environ.get(ENV_ENDPOINT) else _credentials()
    session = AuthorizedSession(credentials)
    widen(session)
    return storage.Client(project=None, credentials=credentials, _http=session)


def _credentials() -> Credentials:
    """The service account of the environment's key, else the identity of the pod or the machine."""
    text = os.environ.get(ENV_KEY)
    if not text:
        found: Credentials = google.auth.default(scopes=_SCOPES)[0]
        return found
    try:
        key: Credentials = service_account.Credentials.from_service_account_info(json.loads(text), scopes=_SCOPES)
    except (ValueError, GoogleAuthError, AttributeError, TypeError):  # a message could repeat a part of the key
        raise CredentialsError(f"{ENV_KEY} is not the JSON key of a Google service account") from None
    return key
