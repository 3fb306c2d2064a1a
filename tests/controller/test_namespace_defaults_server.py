"""Defaults of a namespace on a real API server: the operator's own rights and watches find the ConfigMap."""

import pytest
from controller.builders import Raw, spec
from controller.operator_process import Cluster, OperatorProcess
from internvl_api.constants import API_VERSION, GROUP, KIND, PLURAL, VERSION
from ivft_cluster.shell import wait_for

pytestmark = pytest.mark.integration
NAME = "internvl-defaults"


def write(cluster: Cluster, text: str) -> None:
    body = {"metadata": {"name": NAME}, "data": {"defaults.yaml": text}}
    if NAME in [each.metadata.name for each in cluster.core.list_namespaced_config_map(cluster.namespace).items]:
        cluster.core.patch_namespaced_config_map(NAME, cluster.namespace, body)
    else:
        cluster.core.create_namespaced_config_map(cluster.namespace, body)


def test_a_short_run_waits_for_its_defaults_and_follows_them_until_it_starts(
    cluster_of_test: Cluster, operator: OperatorProcess
) -> None:
    cluster = cluster_of_test
    short = {key: value for key, value in spec().items() if key != "output"}
    body: Raw = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "run"}, "spec": short}
    cluster.runs.create_namespaced_custom_object(GROUP, VERSION, cluster.namespace, PLURAL, body)
    cluster.wait_condition("Stalled", "InvalidSpec")
    write(cluster, "podTemplate: {image: 3}")
    cluster.wait_condition("Stalled", "InvalidDefaults")
    write(cluster, "outputPrefix: s3://team/runs\npodTemplate: {image: 'registry/team:1'}")
    (pod,) = wait_for("a pod is made", lambda: cluster.core.list_namespaced_pod(cluster.namespace).items)
    assert pod.spec.containers[0].image == "registry/team:1"
    found = cluster.wait("the output is recorded", lambda status: status.get("defaults"))
    assert found["defaults"]["output"] == f"s3://team/runs/{cluster.namespace}/run"
