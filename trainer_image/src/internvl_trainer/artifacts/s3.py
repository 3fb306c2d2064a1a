"""Storage over S3: boto3 with retries; its errors become UserErrors."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

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

from internvl_trainer.artifacts.object_storage import CONNECTIONS, PART, SHA256, Head, ObjectStorage, Service
from internvl_trainer.artifacts.ranges import changed, check_answer
from internvl_trainer.artifacts.storage import ConditionsUnsupported, StoredFile, Tagged
from internvl_trainer.errors import UserError

logger = logging.getLogger(__name__)

# Endpoint and keys come from AWS_* in the environment; boto3 reads them itself. Path-style addresses because
# in-cluster servers rarely have a DNS name for each bucket.
_CLIENT = Config(
    retries={"mode": "standard", "total_max_attempts": 5},
    connect_timeout=10,
    read_timeout=60,
    max_pool_connections=CONNECTIONS,
    s3={"addressing_style": "path"},
)
_TRANSFER = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=8)

_DENIED = {
    "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
    "TokenRefreshRequired", "AllAccessDisabled", "RequestTimeTooSkewed", "UnauthorizedAccess",
}  # fmt: skip
_CHUNK = 1 << 20
_ABSENT = {"404", "NoSuchKey", "NotFound"}
_OTHER_WAS_FIRST = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict", *_ABSENT}
_ANOTHER_VERSION = {"412", "PreconditionFailed"}
_NOT_IMPLEMENTED = {"501", "NotImplemented"}


class S3Storage(ObjectStorage):
    """Keys under s3://bucket/prefix."""

    service = Service(
        "s3://", "bucket", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "the bucket's policy", "AWS_ENDPOINT_URL"
    )
    errors = (BotoCoreError, Boto3Error, ClientError, HTTPError, ValueError)

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

    def download(self, key: str, path: Path) -> None:
        origin = self._bucket, self._key(key), str(path)
        self._call(key, lambda client: client.download_file(*origin, Config=_TRANSFER))

    def write(self, key: str, data: bytes) -> None:
        self._call(key, lambda client: client.put_object(Bucket=self._bucket, Key=self._key(key), Body=data))

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        target = str(path), self._bucket, self._key(key)
        metadata = {"Metadata": {SHA256: sha256}} if sha256 else {}

        def send(client: Any) -> None:
            client.upload_file(*target, ExtraArgs=_checksums(client) | metadata, Config=_TRANSFER)

        self._call(key, send)

    def copy(self, source: str, key: str) -> None:
        """Copy in the part size that `upload` uses, so that both files have comparable checksums."""
        origin = {"Bucket": self._bucket, "Key": self._key(source)}

        def send(client: Any) -> None:
            client.copy(origin, self._bucket, self._key(key), ExtraArgs=_checksums(client), Config=_TRANSFER)

        self._call(source, send)

    def drop_unfinished(self, prefix: str) -> None:
        where = {"Bucket": self._bucket, "Prefix": self._root + prefix}
        try:
            self._call(prefix, partial(_abort_uploads, where=where))
        except UserError as error:  # publishing works without this permission
            logger.warning("cannot clean up unfinished uploads under %s/%s: %s", self.uri, prefix, error)

    def _client(self) -> Any:
        return _client(os.getpid())

    def _list(self, client: Any, prefix: str) -> Iterator[StoredFile]:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                yield StoredFile(item["Key"], item["Size"], item["ETag"].strip('"'))

    def _head(self, client: Any, key: str) -> Head:
        head = client.head_object(Bucket=self._bucket, Key=key, ChecksumMode="ENABLED")
        kept = head.get("ChecksumSHA256")
        is_whole = kept is not None and "-" not in kept  # a multipart object has the checksum of its parts' checksums
        return Head(
            size=head["ContentLength"],
            etag=head["ETag"].strip('"'),
            modified=head["LastModified"].timestamp(),
            recorded=head["Metadata"].get(SHA256),
            sha256=base64.b64decode(kept).hex() if is_whole else None,
            checksum=kept,
        )

    def _get_tagged(self, client: Any, key: str) -> Tagged:
        answer = client.get_object(Bucket=self._bucket, Key=key)
        return Tagged(answer["Body"].read(), answer["ETag"])

    def _put_if(self, client: Any, key: str, data: bytes, expected: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        try:
            tag: str = client.put_object(Bucket=self._bucket, Key=key, Body=data, **condition)["ETag"]
        except ClientError as error:
            code = _code(error)
            if code in _NOT_IMPLEMENTED:
                raise ConditionsUnsupported(f"{self.uri}: the server answers {code}") from error
            if code in _OTHER_WAS_FIRST:
                return None
            raise
        return tag

    def _get_range(self, client: Any, file: StoredFile, start: int, end: int) -> bytes:
        place, condition = f"{self.uri}/{file.key}", {"IfMatch": f'"{file.etag}"', "Range": f"bytes={start}-{end - 1}"}
        try:
            answer = client.get_object(Bucket=self._bucket, Key=self._key(file.key), **condition)
        except ClientError as error:
            if _code(error) in _ANOTHER_VERSION:
                raise changed(place) from error
            raise
        with answer["Body"] as body:
            if answer["ETag"].strip('"') != file.etag:
                raise changed(place)
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            check_answer(place, status, answer.get("ContentRange"), start, end, file.size)
            data: bytes = body.read()
        return data

    def _hash(self, client: Any, key: str) -> str:
        digest = hashlib.sha256()
        for chunk in client.get_object(Bucket=self._bucket, Key=key)["Body"].iter_chunks(_CHUNK):
            digest.update(chunk)
        return digest.hexdigest()

    def _delete(self, client: Any, key: str) -> None:
        client.delete_object(Bucket=self._bucket, Key=key)

    def _failure(self, error: Exception, key: str) -> UserError:
        cause = error.__cause__ or error.__context__
        if isinstance(error, Boto3Error) and isinstance(cause, ClientError):
            error = cause
        if isinstance(error, ClientError):
            return self._answer(error, key)
        if isinstance(error, NoCredentialsError | PartialCredentialsError | NoRegionError):
            return self._no_credentials(key, str(error))
        return self._unreachable(key, error)

    def _answer(self, error: ClientError, key: str) -> UserError:
        code = _code(error)
        if code == "NoSuchBucket":
            return self._no_bucket(key)
        if code in _ABSENT:
            return self._not_found(key)
        if code in _DENIED or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) in (401, 403):
            return self._denied(key, code)
        return self._refused(key, f"{code} {error.response.get('Error', {}).get('Message', '')}".strip())


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _checksums(client: Any) -> dict[str, str]:
    """Upload settings: the server checks and keeps each part's SHA-256, except servers without checksums."""
    wanted = client.meta.config.request_checksum_calculation == "when_supported"
    return {"ChecksumAlgorithm": "SHA256"} if wanted else {}


def _abort_uploads(client: Any, *, where: dict[str, str]) -> None:
    for page in client.get_paginator("list_multipart_uploads").paginate(**where):
        for upload in page.get("Uploads", []):
            if upload["Key"].startswith(where["Prefix"]):  # some servers list more than the prefix asks for
                client.abort_multipart_upload(Bucket=where["Bucket"], Key=upload["Key"], UploadId=upload["UploadId"])


@lru_cache(maxsize=1)
def _client(_process: int) -> Any:
    """The client of this process, for all its threads; a fork needs its own connections, hence the argument."""
    return boto3.session.Session().client("s3", config=_CLIENT)
