"""Storage over Azure Blob Storage: block blobs with ETag conditions; Azure's errors become UserErrors."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import requests
from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
)
from azure.core.pipeline.transport import RequestsTransport
from azure.identity import DefaultAzureCredential
from azure.storage.blob import BlobClient, BlobServiceClient, ContainerClient, ExponentialRetry

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

ENV_CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
ENV_ACCOUNT = "AZURE_STORAGE_ACCOUNT_NAME"
ENV_KEY = "AZURE_STORAGE_ACCOUNT_KEY"
ENV_SAS = "AZURE_STORAGE_SAS_TOKEN"

_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_HAS_KEY = re.compile(r"(AccountKey|SharedAccessSignature)=", re.IGNORECASE)
_QUERY = re.compile(r"\?\S*")  # of an address in an error, which may have a signature
_COPIED = "copied"  # the metadata with the ETag of the blob that this one is a copy of
_FOLDER = "hdi_isfolder"  # the metadata of a folder, in an account with a hierarchical namespace
_COPY_SECONDS = 3600.0
_SCOPE = "https://storage.azure.com/.default"
_DENIED = (401, 403)


class AzureStorage(ObjectStorage):
    """Keys under az://container/prefix, in the account that AZURE_STORAGE_* names."""

    service = Service(
        "az://",
        "container",
        f"{ENV_CONNECTION}, or {ENV_ACCOUNT} and {ENV_KEY},",
        "the roles and the firewall of the storage account",
        f"{ENV_ACCOUNT} or {ENV_CONNECTION}",
    )
    errors = (AzureError, ValueError)

    def read(self, key: str) -> bytes:
        data: bytes = self._call(key, lambda client: self._blob(client, key).download_blob().readall())
        return data

    def read_start(self, key: str, length: int) -> bytes:
        data: bytes = self._call(
            key, lambda client: self._blob(client, key).download_blob(offset=0, length=length).readall()
        )
        return data

    def download(self, key: str, path: Path) -> None:
        def receive(client: Any) -> None:
            with path.open("wb") as file:
                self._blob(client, key).download_blob(max_concurrency=8).readinto(file)

        self._call(key, receive)

    def write(self, key: str, data: bytes) -> None:
        self._call(key, lambda client: self._blob(client, key).upload_blob(data, overwrite=True))

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """Send in blocks, each with its MD5, which the server checks."""

        def send(client: Any) -> None:
            with path.open("rb") as file:
                self._blob(client, key).upload_blob(
                    file,
                    overwrite=True,
                    length=path.stat().st_size,
                    metadata={SHA256: sha256} if sha256 else None,
                    max_concurrency=8,
                    validate_content=True,
                )

        self._call(key, send)

    def copy(self, source: str, key: str) -> None:
        """Copy on the server one version of the source, and record which."""

        def copy(client: Any) -> None:
            origin, target = self._blob(client, source), self._blob(client, key)
            head = self._head(client, self._key(source))
            recorded = {SHA256: head.recorded} if head.recorded else {}
            condition: dict[str, Any] = {
                "source_etag": f'"{head.etag}"',
                "source_match_condition": MatchConditions.IfNotModified,
            }
            target.start_copy_from_url(origin.url, metadata={**recorded, _COPIED: head.etag}, **condition)
            _wait_for_copy(target)

        self._call(source, copy)

    def drop_unfinished(self, prefix: str) -> None:
        """Nothing to do: blocks that no blob was made of are never listed, and Azure deletes them after a week."""

    def _client(self) -> Any:
        return _client(os.getpid()).get_container_client(self._bucket)

    def _blob(self, client: ContainerClient, key: str) -> BlobClient:
        return client.get_blob_client(self._key(key))

    def _list(self, client: ContainerClient, prefix: str) -> Iterator[StoredFile]:
        for blob in client.list_blobs(name_starts_with=prefix, include=["metadata"]):
            if not (blob.metadata or {}).get(_FOLDER):
                yield StoredFile(blob.name, blob.size, blob.etag.strip('"'))

    def _head(self, client: ContainerClient, key: str) -> Head:
        found = client.get_blob_client(key).get_blob_properties()
        recorded = found.metadata or {}
        return Head(
            size=found.size,
            etag=found.etag.strip('"'),
            modified=found.last_modified.timestamp(),
            recorded=recorded.get(SHA256),
            copied=recorded.get(_COPIED),
        )

    def _get_tagged(self, client: ContainerClient, key: str) -> Tagged:
        answer = client.download_blob(key)
        return Tagged(answer.readall(), answer.properties.etag)

    def _put_if(self, client: ContainerClient, key: str, data: bytes, expected: str | None) -> str | None:
        condition: dict[str, Any] = {"etag": expected, "match_condition": MatchConditions.IfNotModified}
        try:
            answer = client.get_blob_client(key).upload_blob(
                data, overwrite=expected is not None, **(condition if expected is not None else {})
            )
        except (ResourceExistsError, ResourceModifiedError):
            return None
        except ResourceNotFoundError as error:
            if _code(error) == "ContainerNotFound":
                raise
            return None
        return str(answer["etag"])

    def _get_range(self, client: ContainerClient, file: StoredFile, start: int, end: int) -> bytes:
        condition: dict[str, Any] = {"etag": f'"{file.etag}"', "match_condition": MatchConditions.IfNotModified}
        blob = client.get_blob_client(self._key(file.key))
        try:
            data: bytes = blob.download_blob(offset=start, length=end - start, **condition).readall()
        except ResourceModifiedError as error:
            raise changed(f"{self.uri}/{file.key}") from error
        return data

    def _hash(self, client: ContainerClient, key: str) -> str:
        digest = hashlib.sha256()
        for chunk in client.download_blob(key).chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def _delete(self, client: ContainerClient, key: str) -> None:
        try:
            client.delete_blob(key)
        except ResourceNotFoundError as error:
            if _code(error) == "ContainerNotFound":
                raise

    def _failure(self, error: Exception, key: str) -> UserError:
        if isinstance(error, ClientAuthenticationError) and _has_no_identity(error):
            return self._no_credentials(key, "found no key and no identity")
        if isinstance(error, ResourceNotFoundError):
            return self._no_bucket(key) if _code(error) == "ContainerNotFound" else self._not_found(key)
        if isinstance(error, ClientAuthenticationError):
            return self._denied(key, _code(error) or _first_line(error))
        if isinstance(error, HttpResponseError):
            code = _code(error) or str(error.reason or error.status_code)
            if error.status_code in _DENIED:
                return self._denied(key, code)
            return self._refused(key, f"{code} {_first_line(error)}")
        return self._unreachable(key, _first_line(error))


def _has_no_identity(error: ClientAuthenticationError) -> bool:
    """Whether no kind of credentials could be used; else a server has refused some."""
    return error.response is None and "AADSTS" not in str(error)


def _code(error: HttpResponseError) -> str:
    """Azure's own name of an error; "" where there is none."""
    return str(getattr(error, "error_code", None) or "")


def _first_line(error: Exception) -> str:
    """What an error says first, without the query of an address."""
    return _QUERY.sub("", str(error).strip().partition("\n")[0])[:300]


def _wait_for_copy(target: BlobClient) -> None:
    """Wait until the server has copied; within an account that is usually at once. Raises HttpResponseError."""
    limit, pause = time.monotonic() + _COPY_SECONDS, 0.1
    while (copy := target.get_blob_properties().copy).status == "pending":
        if time.monotonic() > limit:
            raise HttpResponseError(f"the copy has not ended within {_COPY_SECONDS:.0f} s ({copy.progress} bytes)")
        time.sleep(pause)
        pause = min(pause * 2, 10.0)
    if copy.status not in (None, "success"):
        raise HttpResponseError(f"the copy has ended with {copy.status}: {copy.status_description}")


@lru_cache(maxsize=1)
def _client(_process: int) -> BlobServiceClient:
    """The client of this process, for all its threads; a fork needs its own connections, hence the argument."""
    options: dict[str, Any] = {
        "transport": RequestsTransport(session=widen(requests.Session()), session_owner=False),
        "retry_policy": ExponentialRetry(initial_backoff=1, increment_base=2, retry_total=4),
        "connection_timeout": 10,
        "read_timeout": 60,
        "max_block_size": PART,
        "max_single_put_size": PART,
        "max_single_get_size": PART,
        "max_chunk_get_size": PART,
    }
    if connection := os.environ.get(ENV_CONNECTION):
        try:
            client = BlobServiceClient.from_connection_string(connection, **options)
        except ValueError:  # its message may repeat the value
            raise CredentialsError(f"{ENV_CONNECTION} is not a connection string of a storage account") from None
        return client if _HAS_KEY.search(connection) else BlobServiceClient(client.url, _identity(), **options)
    account = os.environ.get(ENV_ACCOUNT, "")
    if not _ACCOUNT.fullmatch(account):
        raise CredentialsError(f"{ENV_ACCOUNT}: found {account[:40]!r}, expected the name of a storage account")
    return BlobServiceClient(f"https://{account}.blob.core.windows.net", credential=_credential(account), **options)


def _credential(account: str) -> AzureNamedKeyCredential | DefaultAzureCredential | str:
    """The account's key, else the shared access signature, else the identity of the pod."""
    if key := os.environ.get(ENV_KEY):
        return AzureNamedKeyCredential(account, key)
    if signature := os.environ.get(ENV_SAS):
        return signature.removeprefix("?")  # becomes a part of every address, also of the source of a copy
    return _identity()


def _identity() -> DefaultAzureCredential:
    """The identity of the pod or the machine. Raises ClientAuthenticationError at once; requests would try for long."""
    credential = DefaultAzureCredential()
    credential.get_token(_SCOPE)
    return credential
