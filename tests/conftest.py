"""Fixtures every test may ask for: a real API server, a real object store, a real cluster (see tests/cluster)."""

from pathlib import Path

import pytest
import yaml
from internvl_api.constants import GROUP, PLURAL, VERSION
from ivft_cluster import releases
from ivft_cluster.api_server import ApiServer
from ivft_cluster.releases import CONTAINERD, ETCD
from ivft_cluster.shell import wait_for
from kubernetes import client
from kubernetes.client.exceptions import ApiException

pytest_plugins = ["ivft_cluster.fixtures"]

CRD = Path(__file__).parents[1] / "crds/internvlfinetunes.yaml"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which servers the tests ran on."""
    parts = {"Kubernetes": f"v{releases.release()}", "etcd": ETCD.version, "containerd": CONTAINERD.version}
    terminalreporter.write_line("ran with " + ", ".join(f"{name} {version}" for name, version in parts.items()))


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
    wait_for("the CRD is served", lambda: listing(GROUP, VERSION, PLURAL))
    return api_server
