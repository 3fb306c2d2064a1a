"""Fixtures of the tests that run the real operator process against a real API server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from controller.operator_process import Cluster, OperatorProcess
from controller.pod_groups import install_pod_groups
from controller.story import Story
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import FakeKubelet
from kubernetes import client


@pytest.fixture(scope="session")
def volcano(served: ApiServer) -> Any:
    """A client of PodGroups, on a server that from now on knows volcano's."""
    install_pod_groups(served)
    return client.CustomObjectsApi(served.api)


@pytest.fixture
def kubelet(served: ApiServer) -> Iterator[FakeKubelet]:
    """Nodes that run every pod until a test ends it."""
    with FakeKubelet(served.api) as running:
        yield running


@pytest.fixture
def cluster_of_test(served: ApiServer) -> Iterator[Cluster]:
    """A namespace of its own for each test, and a user's view of it."""
    with served.namespace("ivft") as namespace:
        yield Cluster(served, namespace)


@pytest.fixture
def operator(cluster_of_test: Cluster, tmp_path: Path) -> Iterator[OperatorProcess]:
    """The operator's process, looking after the test's namespace."""
    with OperatorProcess(cluster_of_test, tmp_path) as running:
        yield running


@pytest.fixture
def run(cluster_of_test: Cluster, kubelet: FakeKubelet) -> Story:
    """The run that a test drives through its stages."""
    return Story(cluster_of_test, kubelet)
