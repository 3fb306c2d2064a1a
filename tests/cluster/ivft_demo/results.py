"""Checks of a run's results in object storage, like a careful user: files, manifests, the loss curve."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MANIFEST, METRICS = "manifest.json", "metrics.jsonl"


class ResultProblem(AssertionError):
    """An artifact is absent or differs from its manifest."""


class Artifact(NamedTuple):
    """A published file: path below the manifest's folder, bytes, hex sha256."""

    path: str
    size: int
    sha256: str


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI.

    >>> split_uri("s3://demo/runs/quickstart")
    ('demo', 'runs/quickstart')
    """
    parts = urlsplit(uri)
    return parts.netloc, parts.path.strip("/")


def read_object(s3: S3Client, uri: str) -> bytes:
    bucket, key = split_uri(uri)
    content: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    return content


def list_keys(s3: S3Client, uri: str) -> list[str]:
    """Keys below a folder, relative to it, sorted."""
    bucket, prefix = split_uri(f"{uri}/")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    return sorted(each["Key"].removeprefix(f"{prefix}/") for page in pages for each in page.get("Contents", []))


def download(s3: S3Client, uri: str, folder: Path) -> None:
    """Copy everything below `uri` into `folder`."""
    for name in list_keys(s3, uri):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_object(s3, f"{uri}/{name}"))


def verify_manifest(s3: S3Client, folder: str) -> list[Artifact]:
    """Download every file in `folder`/manifest.json, compare it with the manifest, and return the files.

    Raises ResultProblem naming the first file whose size or sha256 differs, botocore's ClientError for an absent one.
    """
    manifest = json.loads(read_object(s3, f"{folder}/{MANIFEST}"))
    artifacts = [Artifact(**entry) for entry in manifest["files"]]
    if not artifacts:
        raise ResultProblem(f"{folder}/{MANIFEST} names no file")
    for artifact in artifacts:
        content = read_object(s3, f"{folder}/{artifact.path}")
        found = Artifact(artifact.path, len(content), hashlib.sha256(content).hexdigest())
        if found != artifact:
            raise ResultProblem(f"{folder}/{artifact.path}: found {found}, its manifest says {artifact}")
    return artifacts


class Loss(NamedTuple):
    step: int
    loss: float


def losses(s3: S3Client, output: str) -> list[Loss]:
    """Loss of every step of a finished run, in order; `output` is spec.output."""
    lines = read_object(s3, f"{output}/artifacts/{METRICS}").splitlines()
    return [Loss(record["step"], record["loss"]) for record in map(json.loads, lines)]


def learnt(curve: list[Loss], window: int = 3) -> float:
    """Mean of the last `window` losses divided by the mean of the first; below 1 if the model learned."""
    first, last = curve[:window], curve[-window:]
    return sum(each.loss for each in last) / sum(each.loss for each in first)
