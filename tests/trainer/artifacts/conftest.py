"""A folder, a bucket of a real S3 server, and those of emulators of other clouds behind the same interface."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from internvl_trainer.artifacts.storage import Storage, open_storage
from ivft_cluster.azurite import Azurite
from ivft_cluster.gcs_server import GcsServer
from ivft_cluster.s3 import S3Server

_BUCKETS = {"s3": "bucket", "gs": "gs_bucket", "az": "az_container"}  # fixtures
STORES = [pytest.param(name, marks=pytest.mark.integration) for name in _BUCKETS]


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with its credentials in this process's environment."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    forget_client()
    return s3_server


@pytest.fixture
def bucket(s3_env: S3Server) -> Iterator[str]:
    """A new bucket's URI. It goes after the test: each takes some of the server's volumes, which are numbered."""
    client, name = s3_env.client(), f"test-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    yield f"s3://{name}"
    for upload in client.list_multipart_uploads(Bucket=name).get("Uploads", []):
        client.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
    for item in client.list_objects_v2(Bucket=name).get("Contents", []):
        client.delete_object(Bucket=name, Key=item["Key"])
    client.delete_bucket(Bucket=name)


@pytest.fixture
def gs_bucket(gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket's URI, and the emulator's address in this process's environment."""
    for name, value in gcs_server.env.items():
        monkeypatch.setenv(name, value)
    forget_client()
    return gcs_server.new_bucket()


@pytest.fixture
def az_container(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new container's URI, and the emulator's account in this process's environment."""
    for name, value in azurite.env.items():
        monkeypatch.setenv(name, value)
    forget_client()
    return azurite.new_container()


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> str:
    """The URI of an empty bucket or container, once on each object store."""
    return str(request.getfixturevalue(_BUCKETS[request.param]))


@pytest.fixture(params=["folder", *STORES])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage, once on disk and once on each object store."""
    if request.param == "folder":
        return open_storage(str(tmp_path / "output"), field="spec.output")
    return open_storage(f"{request.getfixturevalue(_BUCKETS[request.param])}/team/run", field="spec.output")


def forget_client() -> None:
    """Credentials are read when the client is made."""
    from internvl_trainer.artifacts import azure, gcs, s3

    for module in (azure, gcs, s3):
        module._client.cache_clear()


@pytest.fixture
def new_credentials(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change AWS_* for the rest of the test."""

    def change(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        forget_client()

    return change
