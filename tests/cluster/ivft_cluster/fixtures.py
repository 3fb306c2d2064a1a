"""pytest fixtures: `api_server`, `s3_server`, `gcs_server`, `azurite`, `cluster`. Loaded by tests/conftest.py."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from ivft_cluster import images, machine
from ivft_cluster.api_server import ApiServer
from ivft_cluster.azurite import Azurite
from ivft_cluster.cluster import Cluster
from ivft_cluster.gcs_server import GcsServer
from ivft_cluster.paths import CHECKOUT, cache_dir, content_hash
from ivft_cluster.s3 import S3Server


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A real API server without nodes; make a namespace for each test with `api_server.namespace()`."""
    with ApiServer(tmp_path_factory.mktemp("api-server")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on loopback; make a bucket for each test."""
    server = S3Server.on_loopback(tmp_path_factory.mktemp("s3"))
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.delete()


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    """An emulator of Google Cloud Storage on loopback; make a bucket for each test."""
    server = GcsServer.on_loopback(tmp_path_factory.mktemp("gcs"))
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.delete()


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """An emulator of Azure Blob Storage on loopback; make a container for each test."""
    server = Azurite.on_loopback(tmp_path_factory.mktemp("azurite"))
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.delete()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two real nodes with object storage, Prometheus, DNS and the base image loaded.

    When IVFT_CLUSTER_STATE names a cluster that is up, that one is used and left up.
    """
    given = os.environ.get("IVFT_CLUSTER_STATE")
    if given and (running := Cluster(given)).is_up():
        running.load(images.base_image())
        yield running
        return
    machine.require_root()
    with _state_of_this_run() as state:
        own = Cluster(given or state)
        own.up(nodes=2)
        try:
            own.load(images.base_image())
            yield own
        finally:
            own.down()


@contextmanager
def _state_of_this_run() -> Iterator[Path]:
    """The checkout's first folder that no other test session holds; a later session cleans up after a killed one."""
    for number in itertools.count():
        state = cache_dir() / f"cluster-tests-{content_hash([str(CHECKOUT)])}-{number}"
        try:
            held = FileLock(state.with_suffix(".lock")).acquire(timeout=0)
        except Timeout:
            continue
        with held:
            yield state
        return
