"""Storage over S3: boto3 with retries; its errors become UserErrors."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
)
from urllib3.exceptions import HTTPError

from internvl_trainer.artifacts.ranges import changed, check_answer, check_length
from internvl_trainer.artifacts.storage import ConditionsUnsupported, StoredFile, Tagged, inside
from internvl_trainer.errors import AccessDenied, Unavailable, UserError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# Endpoint and keys come from AWS_* in the environment; boto3 reads them itself. Path-style addresses because
# in-cluster servers rarely have a DNS name for each bucket.
_CLIENT = Config(
    retries={"mode": "standard", "total_max_attempts": 5},
    connect_timeout=10,
    read_timeout=60,
    max_pool_connections=32,
    s3={"addressing_style": "path"},
)
_TRANSFER = TransferConfig(multipart_threshold=32 << 20, multipart_chunksize=32 << 20, max_concurrency=8)

_DENIED = {
    "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
    "TokenRefreshRequired", "AllAccessDisabled", "RequestTimeTooSkewed", "UnauthorizedAccess",
}  # fmt: skip
_SHA256 = "sha256"  # the user metadata with a file's digest in hex
_CHUNK = 1 << 20
_ABSENT = {"404", "NoSuchKey", "NotFound"}
_OTHER_WAS_FIRST = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict", *_ABSENT}
_ANOTHER_VERSION = {"412", "PreconditionFailed"}
_NOT_IMPLEMENTED = {"501", "NotImplemented"}


class S3Storage:
    """Keys under s3://bucket/prefix."""

    def __init__(self, uri: str, *, field: str) -> None:
        self.uri, self._field = uri.rstrip("/"), field
        self._bucket, _, self._prefix = self.uri.removeprefix("s3://").partition("/")
        self._root = f"{self._prefix}/" if self._prefix else ""

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        where = {"Bucket": self._bucket, "Prefix": self._root + prefix}
        pages = iter(self._call(prefix, lambda client: client.get_paginator("list_objects_v2").paginate(**where)))
        while (page := self._call(prefix, lambda _: next(pages, None))) is not None:
            for item in page.get("Contents", []):
                yield StoredFile(item["Key"].removeprefix(self._root), item["Size"], item["ETag"].strip('"'))

    def stat(self, key: str) -> StoredFile | None:
        head = self._head(key)
        return StoredFile(key, head["ContentLength"], head["ETag"].strip('"')) if head else None

    def modified(self, key: str) -> float:
        where = {"Bucket": self._bucket, "Key": self._key(key)}
        time: float = self._call(key, lambda client: client.head_object(**where))["LastModified"].timestamp()
        return time

    def read(self, key: str) -> bytes:
        def get(client: Any) -> bytes:
            body: bytes = client.get_object(Bucket=self._bucket, Key=self._key(key))["Body"].read()
            return body

        return self._call(key, get)

    def read_start(self, key: str, length: int) -> bytes:
        where = {"Bucket": self._bucket, "Key": self._key(key), "Range": f"bytes=0-{length - 1}"}

        def get(client: Any) -> bytes:
            body: bytes = client.get_object(**where)["Body"].read(length)
            return body

        return self._call(key, get)

    def read_range(self, file: StoredFile, start: int, end: int) -> bytes:
        """Bytes [start, end) of this version of a file; see RangeSource."""
        place = f"{self.uri}/{file.key}"
        where = {"Bucket": self._bucket, "Key": self._key(file.key), "IfMatch": f'"{file.etag}"'}

        def get(client: Any) -> bytes:
            try:
                answer = client.get_object(**where, Range=f"bytes={start}-{end - 1}")
            except ClientError as error:
                if str(error.response.get("Error", {}).get("Code", "")) in _ANOTHER_VERSION:
                    raise changed(place) from error
                raise
            with answer["Body"] as body:
                if answer["ETag"].strip('"') != file.etag:
                    raise changed(place)
                status = answer["ResponseMetadata"]["HTTPStatusCode"]
                check_answer(place, status, answer.get("ContentRange"), start, end, file.size)
                data: bytes = body.read()
            return data

        data = self._call(file.key, get)
        check_length(place, data, end - start)
        return data

    def download(self, key: str, path: Path) -> None:
        origin = self._bucket, self._key(key), str(path)
        self._call(key, lambda client: client.download_file(*origin, Config=_TRANSFER))

    def write(self, key: str, data: bytes) -> None:
        self._call(key, lambda client: client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data))

    def read_tagged(self, key: str) -> Tagged | None:
        def get(client: Any) -> Tagged:
            answer = client.get_object(Bucket=self._bucket, Key=self._key(key))
            return Tagged(answer["Body"].read(), answer["ETag"])

        try:
            return self._call(key, get)
        except UserError as error:
            if error.reason == "NotFound":
                return None
            raise

    def replace(self, key: str, data: bytes, *, expected: str | None) -> str | None:
        where = {"Bucket": self._bucket, "Key": self._key(key)}
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}

        def put(client: Any) -> str | None:
            try:
                tag: str = client.put_object(**where, Body=data, **condition)["ETag"]
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", ""))
                if code in _NOT_IMPLEMENTED:
                    raise ConditionsUnsupported(f"{self.uri}: the server answers {code}") from error
                if code in _OTHER_WAS_FIRST:
                    return None
                raise
            return tag

        if (tag := self._call(key, put)) is not None:
            return tag
        found = self.read_tagged(key)  # boto3 may have sent the request twice: the first was stored, the second refused
        return found.tag if found and found.data == data else None

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        target = str(path), self._bucket, self._key(key)
        metadata = {"Metadata": {_SHA256: sha256}} if sha256 else {}

        def send(client: Any) -> None:
            client.upload_file(*target, ExtraArgs=_checksums(client) | metadata, Config=_TRANSFER)

        self._call(key, send)

    def copy(self, source: str, key: str) -> None:
        """Copy in the part size that `upload` uses, so that both files have comparable checksums."""
        origin = {"Bucket": self._bucket, "Key": self._key(source)}

        def send(client: Any) -> None:
            client.copy(origin, self._bucket, self._key(key), ExtraArgs=_checksums(client), Config=_TRANSFER)

        self._call(source, send)

    def has_content(self, key: str, size: int, sha256: str, *, like: str | None = None) -> bool:
        head = self._head(key)
        if head is None or head["ContentLength"] != size:
            return False
        kept = head.get("ChecksumSHA256", "")
        if kept and "-" not in kept:  # the whole object's; a multipart object has the checksum of its parts' checksums
            return bool(kept == base64.b64encode(bytes.fromhex(sha256)).decode())
        if kept and like and (origin := self._head(like)):
            same = kept == origin.get("ChecksumSHA256") and size == origin["ContentLength"]
            if same and origin["Metadata"].get(_SHA256) == sha256:
                return True
        return self._call(key, partial(_sha256_of, bucket=self._bucket, key=self._key(key))) == sha256

    def drop_unfinished(self, prefix: str) -> None:
        where = {"Bucket": self._bucket, "Prefix": self._root + prefix}
        try:
            self._call(prefix, partial(_abort_uploads, where=where))
        except UserError as error:  # publishing works without this permission
            logger.warning("cannot clean up unfinished uploads under %s/%s: %s", self.uri, prefix, error)

    def delete(self, prefix: str) -> None:
        for stored in list(self.list(prefix)):
            key = self._key(stored.key)
            self._call(stored.key, partial(_delete, bucket=self._bucket, key=key))

    def _head(self, key: str) -> dict[str, Any] | None:
        where = {"Bucket": self._bucket, "Key": self._key(key), "ChecksumMode": "ENABLED"}
        try:
            head: dict[str, Any] = self._call(key, lambda client: client.head_object(**where))
        except UserError as error:
            if error.reason == "NotFound":
                return None
            raise
        return head

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self._prefix, inside(key, field=self._field)) if part)

    def _call(self, key: str, call: Callable[[Any], Result]) -> Result:
        try:
            return call(_client(os.getpid()))
        except ClientError as error:
            raise self._failure(error, key) from error
        except (BotoCoreError, Boto3Error, HTTPError, ValueError) as error:
            raise self._lost(error, key) from error

    def _failure(self, error: ClientError, key: str) -> UserError:
        details = error.response.get("Error", {})
        code, place = str(details.get("Code", "")), f"s3://{self._bucket}/{self._key(key)}"
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return UserError("NoSuchBucket", f"found no bucket {self._bucket!r} for {place}; make it", self._field)
        if code in _ABSENT:
            return UserError("NotFound", f"found no object {place}; check the URI", self._field)
        if code in _DENIED or status in (401, 403):
            return AccessDenied(
                "AccessDenied",
                f"{place} was refused ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the Secret "
                "spec.secrets.objectStorage, and the bucket's policy",
                self._field,
            )
        return Unavailable("StorageUnavailable", f"{place}: {code} {details.get('Message', '')}".strip(), self._field)

    def _lost(self, error: Exception, key: str) -> UserError:
        place = f"s3://{self._bucket}/{self._key(key)}"
        if isinstance(error, NoCredentialsError | PartialCredentialsError | NoRegionError):
            return AccessDenied(
                "CredentialsMissing",
                f"{place}: {error}; name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in "
                "spec.secrets.objectStorage, or a ServiceAccount with a workload identity in "
                "spec.podTemplate.serviceAccountName",
                self._field,
            )
        cause = error.__cause__ or error.__context__
        if isinstance(error, Boto3Error) and isinstance(cause, ClientError):
            return self._failure(cause, key)
        return Unavailable(
            "StorageUnavailable", f"{place}: {error}; check AWS_ENDPOINT_URL and that the server runs", self._field
        )


def _delete(client: Any, *, bucket: str, key: str) -> None:
    client.delete_object(Bucket=bucket, Key=key)


def _checksums(client: Any) -> dict[str, str]:
    """Upload settings: the server checks and keeps each part's SHA-256, except servers without checksums."""
    wanted = client.meta.config.request_checksum_calculation == "when_supported"
    return {"ChecksumAlgorithm": "SHA256"} if wanted else {}


def _sha256_of(client: Any, *, bucket: str, key: str) -> str:
    digest = hashlib.sha256()
    for chunk in client.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _abort_uploads(client: Any, *, where: dict[str, str]) -> None:
    for page in client.get_paginator("list_multipart_uploads").paginate(**where):
        for upload in page.get("Uploads", []):
            if upload["Key"].startswith(where["Prefix"]):  # some servers list more than the prefix asks for
                client.abort_multipart_upload(Bucket=where["Bucket"], Key=upload["Key"], UploadId=upload["UploadId"])


@lru_cache(maxsize=1)
def _client(_process: int) -> Any:
    """The client of this process, for all its threads; a fork needs its own connections, hence the argument."""
    return boto3.session.Session().client("s3", config=_CLIENT)
