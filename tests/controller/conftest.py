"""Fixtures of the tests that run the real operator process against a real API server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from controller.operator_process import POD_GROUPS, Cluster, OperatorProcess
from controller.story import Story
from ivft_cluster.api_server import ApiServer
from ivft_cluster.crds import install_crd
from ivft_cluster.fake_kubelet import FakeKubelet
from kubernetes import client

POD_GROUP_SPEC = Path(__file__).parents[1] / "data/crds/volcano-podgroup.yaml"


@pytest.fixture(scope="session")
def volcano(served: ApiServer) -> Any:
    """A client of PodGroups, on a server that from now on knows volcano's."""
    spec = yaml.safe_load(POD_GROUP_SPEC.read_text())
    del spec["properties"]["minResources"]  # not ours, and its int-or-string is not in the excerpt
    group, version, plural = POD_GROUPS
    properties = {"spec": spec, "status": {"type": "object"}}
    schema = {"openAPIV3Schema": {"type": "object", "properties": properties}}
    install_crd(
        served,
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.{group}"},
            "spec": {
                "group": group,
                "scope": "Namespaced",
                "names": {"kind": "PodGroup", "plural": plural, "singular": "podgroup"},
                "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
            },
        },
    )
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
