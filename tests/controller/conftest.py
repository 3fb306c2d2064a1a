"""Fixtures of the tests that run the real operator process against a real API server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from controller.operator_process import Cluster, OperatorProcess
from internvl_api.constants import GROUP, PLURAL
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import wait_for
from kubernetes import client
from kubernetes.client.exceptions import ApiException

CRD = Path(__file__).parents[2] / "crds/internvlfinetunes.yaml"


@pytest.fixture(scope="session")
def served(api_server: ApiServer) -> ApiServer:
    """An API server that knows InternVLFineTunes."""
    extensions = client.ApiextensionsV1Api(api_server.api)
    try:
        extensions.create_custom_resource_definition(yaml.safe_load(CRD.read_text()))
    except ApiException as error:
        if error.status != 409:
            raise
    listing = client.CustomObjectsApi(api_server.api).list_cluster_custom_object
    wait_for("the CRD is served", lambda: listing(GROUP, "v1alpha1", PLURAL))
    return api_server


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
