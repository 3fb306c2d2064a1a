"""The operator's process and PodGroups on a real API server, with volcano's own schema of them; no scheduler runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from controller.operator_process import Cluster, OperatorProcess
from ivft_cluster.api_server import ApiServer
from ivft_cluster.fake_kubelet import FakeKubelet
from ivft_cluster.shell import wait_for
from kubernetes import client

pytestmark = pytest.mark.integration
GROUP, VERSION, PLURAL = "scheduling.volcano.sh", "v1beta1", "podgroups"
SCHEMA = Path(__file__).parents[1] / "data/crds/volcano-podgroup.yaml"


@pytest.fixture
def volcano(served: ApiServer) -> Iterator[Any]:
    """A client of PodGroups, on a server that knows them."""
    schema = {
        "type": "object",
        "properties": {"spec": yaml.safe_load(SCHEMA.read_text()), "status": {"type": "object"}},
    }
    del schema["properties"]["spec"]["properties"][
        "minResources"
    ]  # not ours, and its int-or-string is not in the excerpt
    names = {"kind": "PodGroup", "plural": PLURAL, "singular": "podgroup"}
    version = {"name": VERSION, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    extensions: Any = client.ApiextensionsV1Api(served.api)
    extensions.create_custom_resource_definition(
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{PLURAL}.{GROUP}"},
            "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
        }
    )
    objects: Any = client.CustomObjectsApi(served.api)
    wait_for("PodGroups are served", lambda: objects.list_cluster_custom_object(GROUP, VERSION, PLURAL))
    yield objects
    extensions.delete_custom_resource_definition(f"{PLURAL}.{GROUP}")


def test_a_pod_group_is_made_mended_and_goes_with_its_job(
    volcano: Any, cluster_of_test: Cluster, kubelet: FakeKubelet, tmp_path: Path
) -> None:
    def found() -> dict[str, Any]:
        items = volcano.list_namespaced_custom_object(GROUP, VERSION, cluster_of_test.namespace, PLURAL)["items"]
        return {item["metadata"]["name"]: item["spec"] for item in items}

    with OperatorProcess(cluster_of_test, tmp_path, GANG_SCHEDULERS="volcano") as operator:
        cluster_of_test.create(scheduling={"gang": "volcano", "queue": "research"})
        kubelet.wait_phase(cluster_of_test.namespace, "run-preflight-0")
        assert found() == {"ivft-run-preflight": {"minMember": 1, "queue": "research"}}
        pod = cluster_of_test.core.read_namespaced_pod("run-preflight-0", cluster_of_test.namespace)
        assert pod.metadata.annotations["scheduling.k8s.io/group-name"] == "ivft-run-preflight"
        assert pod.spec.scheduler_name == "volcano"
        volcano.patch_namespaced_custom_object(
            GROUP, VERSION, cluster_of_test.namespace, PLURAL, "ivft-run-preflight", {"spec": {"minMember": 7}}
        )
        wait_for("it is mended", lambda: found()["ivft-run-preflight"]["minMember"] == 1)
        assert operator.metric("internvl_operator_watch_age_seconds", kind="PodGroup.scheduling.volcano.sh") < 3600
        cluster_of_test.delete()
        wait_for("it went with its job", lambda: not found(), timeout=90)
